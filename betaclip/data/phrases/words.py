"""Lists of English words by which phrases and sentences of captions are found."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words for the picture rather than for its content.
BLACKLIST = _words(
    "image photo photograph picture snapshot scene view viewer composition background foreground atmosphere mood "
    "overall"
)
ARTICLES = _words("a an the")
POINTERS = ARTICLES | _words("this that these those its their his her our your")

# Nouns that name a place relative to something: "on the left side of the bed", "in front of it".
PLACES = _words(
    "left right top bottom center centre middle front back rear side corner edge end foreground background distance "
    "upper lower half part portion"
)
PUBLISHED_PLACES = _words("left right top bottom center centre middle front back far")
SPATIAL_PREPOSITIONS = _words(
    "above across against along alongside among around atop behind below beneath beside between beyond inside near "
    "opposite outside over past through throughout toward towards under underneath"
)
PLACE_PREPOSITIONS = SPATIAL_PREPOSITIONS | _words("at by from in into on onto to")
BEFORE_TO = _words("next close adjacent opposite")  # "next to the window"

# Closed classes of words, for the extractor without a tagger.
DETERMINERS = _words(
    "a an the this these those his her its their my our your some any each every several many few no both another "
    "various numerous multiple countless all most half one two three four five six seven eight nine ten eleven twelve "
    "dozen dozens whose"
)
PREPOSITIONS = PLACE_PREPOSITIONS | _words(
    "about after as before despite during except for like of off out per since than until up upon via with within "
    "without amid amidst down including featuring"
)
BREAKS = _words(  # conjunctions, pronouns and adverbs: they end a noun phrase and belong to none
    "that and or but nor so yet while whereas although though because if unless when where which who whom what how "
    "whether it he she they them him himself herself itself themselves you we i me us someone something everything "
    "there here not also very quite rather too just only even still already almost nearly together apart away "
    "forward upward downward upwards downwards outward inward far further perhaps maybe however overall indeed likely"
)
HAVE = _words("has have had having")
AUXILIARIES = HAVE | _words(
    "is are was were be been being am do does did can could may might must will would shall should "
    "seem seems appear appears remain remains become becomes look looks"
)
NOT_ADVERBS = _words(
    "family lovely friendly lively curly early elderly lonely silly ugly holy butterfly fly assembly jelly belly daily "
    "bubbly woolly hilly chilly lily supply italy july oily scaly prickly"
)

# Verbs that captions use: first those that are hardly ever nouns there, then those that often are.
VERBS = _words(
    "accentuate accompany add adorn allow appear arrange attach attract blend bring build captivate capture carry "
    "cast catch celebrate chase chat clean climb complement connect consist contain continue convey create decorate "
    "depict dig dine display divide dominate drape draw drink drive eat emanate emerge emphasize encircle enclose "
    "engage enhance enjoy enter evoke exhibit extend exude face fall feature feed feel fill flank float flutter fly "
    "follow gather gaze give glide glow go grasp graze grow hang highlight hold hover illuminate illustrate immerse "
    "include indicate invite jump keep kneel lay lead lean leap leave lie look make meet mirror nestle obscure "
    "occupy offer overlook paint peck pedal peek peer perch perform play portray pose position pour present project "
    "protrude provide pull push radiate reach read reflect rest reveal ride rise run scatter see seem separate serve "
    "showcase sit sleep smile soften speak spread stack stand stare stretch submerge suggest surround sway swim take "
    "talk tie tilt touch turn type use wait walk wander watch wear weigh write"
)
NOUN_VERBS = _words(
    "align balance block border brush contrast cover cross crowd cut detail dot drift drop dust edge fade flow form "
    "frame hand head hint hit kick kiss land lift light line mark pack park pass pile place plant point press rain "
    "sail shade shape shine shot show sign slope splash stall start step stop stream support throw top tower "
    "trail travel wash wave work"
)
PARTICIPLES = _words(
    "made seen worn held hung built drawn caught shown taken set lit laid left spread given written strewn known kept "
    "found woven torn sewn brought done thrown cut hidden driven ridden led filled"
)
NOT_PARTICIPLES = _words(
    "building ceiling painting clothing railing awning setting evening morning crossing lighting wing ring string "
    "spring thing king swing wedding drawing opening clearing paving siding beginning viewing bed red shed sled bread "
    "wooded"
)
TRANSITIVE = _words("holding wearing carrying showing featuring displaying selling containing including eating playing")
PLURALS = _words("people children men women fish sheep geese feet teeth")

# Abbreviations. A sentence ends after the first only before a word that is no name ("St. Mary", but "Main St. The"),
# after the second before a capital, and after the third never.
BEFORE_NAMES = _words(
    "st dr mr mrs ms mx prof mt ft gen col sgt capt lt rev hon gov sen rep jr sr ave blvd rd inc ltd co corp"
)
ALSO_LAST = _words("etc a.m p.m")
NEVER_LAST = _words("e.g i.e cf vs approx")
