"""Shards damaged at random: whatever is lost of them, a Bad says so, and reading never raises."""

import random
import tarfile
from pathlib import Path

import pytest
from support.shards import sample, write_shard

from betaclip.data.batches import Bad, Example
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.phrases.cache import PhrasesOnTheFly
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.readers.shards import ShardDataset

TRIALS, SAMPLES = 60, 5
BLOCK = tarfile.BLOCKSIZE
KINDS = ["cut", "flipped bit", "zeroed block", "overwritten", "missing block"]


def damage(content: bytes, kind: str, rng: random.Random) -> bytes:
    """Some fault before the archive's end, where everything belongs to some sample."""
    at = rng.randrange(len(content))
    block = at // BLOCK * BLOCK
    match kind:
        case "cut":
            return content[:at]
        case "flipped bit":
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case "zeroed block":
            return content[:block] + bytes(BLOCK) + content[block + BLOCK :]
        case "overwritten":
            noise = rng.randbytes(rng.randrange(1, 4 * BLOCK))
            return (content[:at] + noise + content[at + len(noise) :])[: len(content)]
    return content[:block] + content[block + BLOCK :]


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_is_lost_silently(tmp_path: Path, chosen: random.Random, kind: str) -> None:
    form = chosen.choice(["txt", "json", "share.json"])
    files = [file for key in range(SAMPLES) for file in sample(key, f"A cat sits on {key} mats.", form)]
    path = tmp_path / "a.tar"
    shard = write_shard(path, files)
    with tarfile.open(shard) as tar:
        tar.getmembers()
        end = tar.offset  # of the last sample; the zero blocks and the padding follow
    whole = path.read_bytes()
    make = ExampleMaker(8, 77, PhrasesOnTheFly(RuleExtractor()))
    all_keys, lost = {f"{shard}/{key}" for key in range(SAMPLES)}, 0
    for trial in range(TRIALS):
        path.write_bytes(damage(whole[:end], kind, chosen) + (b"" if kind == "cut" else whole[end:]))
        items = list(ShardDataset([shard], make, shuffle=0))
        assert all(isinstance(item, Example | Bad) for item in items)
        assert all(item.reason and "\n" not in item.reason for item in items if isinstance(item, Bad))
        read = {item.path for item in items if isinstance(item, Example)}
        bad = {item.path for item in items if isinstance(item, Bad)}
        lost += read != all_keys
        assert read >= all_keys or bad - read, f"trial {trial}: {all_keys - read} is gone, and nothing says so"
        assert shard in bad or all_keys <= read | bad, f"trial {trial}: {all_keys - read - bad} is gone without a Bad"
    assert lost, "no damage reached a sample"
