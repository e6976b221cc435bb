// Every interleaving of a cluster's loading threads, TMA and consumers at the barriers of the ring of stages, for few
// stages, tiles and steps; then the same with faults planted, each of which the search must find.
//
// What each thread does is fixed by ring.h and tiles.h, which run here on a pipeline that records; only the interleaving
// is open. Barriers are modelled after PTX's mbarrier, and used as CUTLASS's PipelineTmaAsync and OrderedSequenceBarrier
// use them: a phase ends when the expected arrivals have come and as many bytes as were announced; a wait for parity p
// passes unless the current phase has it. The search finds deadlocks, products of a stage that holds anything but their
// own columns, loads into a stage that products may still read, two loads of one place at a time, and arrivals and loads
// that reach a block after its exit.
//
// Simplifications, none of which loses a fault:
// * Loads start as soon as the loading thread has the stage, since TMA may deliver at any later time anyway; x and a
//   block's own share of y arrive together, since both go to the same place under the same barrier.
// * Products read their stage from the moment its barrier lets them until the instruction that waits for them.
// * A warpgroup is one agent, since CUTLASS's barriers treat it as one; a cluster's barriers are initialised.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <vector>

#include "../ring.h"

namespace {

using betaclip::kCluster;
using betaclip::kConsumers;

constexpr int kMaxStages = 4;
constexpr int kAgents = 1 + kConsumers;  // of a block: the loading thread, then the consumers

struct Size {
  int stages, row_tiles, col_tiles, steps;  // tiles of each block
  int lost_rows = 0;  // for a second pass, which visits tiles of lost rows alone: a bit for each row tile of the cluster
};

constexpr Size kSizes[] = {
    {2, 1, 1, 1}, {2, 2, 1, 2}, {3, 1, 1, 3}, {3, 1, 2, 2}, {3, 3, 1, 3}, {3, 2, 2, 2}, {3, 2, 1, 4}, {4, 2, 1, 1},
    {3, 2, 2, 2, 0b0100}, {3, 1, 1, 1, 0b1000},
};

enum class Fault {
  kNone,
  kOneArrivalEmpties,
  kNoTail,
  kNoAcquire,
  kProducerStartsLate,
  kFewerBytesExpected,
  kNoMulticast,
  kNoWaitForLoads,
  kConsumersStartEarly,
  kReleaseBeforePrevious,
  kReleaseBeforeLast,
  kReleaseOwnBlockOnly,
  kStagesOfTheOtherNotSkipped,
  kNoTurns,
  kTurnPassedAtOnce,
  kBothTurnsOpen,
  kNoTurnOpen,
  kBlocksOfUnequalTiles,
  kBlocksInDifferentColumns,
  kBlocksSkipDifferentTiles,
  kCount
};

constexpr const char *kNames[] = {
    "none",
    "a stage counts as empty after one release",
    "the loading thread exits without waiting for releases",
    "the loading thread does not wait for an empty stage",
    "the loading thread starts in the consumers' phase",
    "a block expects the bytes of its own loads alone",
    "shares of y reach their own block alone",
    "consumers do not wait for loads",
    "consumers start in the loading thread's phase",
    "a stage is released before the products of the step before have finished",
    "a tile's last stage is released before its products have finished",
    "a stage is released in its own block alone",
    "consumers do not skip the other's stages",
    "no turns",
    "the turn is passed on before a tile's products",
    "both consumers may start",
    "neither consumer may start",
    "blocks of a cluster with unequal numbers of tiles",
    "blocks of a cluster in different columns",
    "blocks of a cluster skip different tiles",
};
static_assert(sizeof kNames / sizeof *kNames == size_t(Fault::kCount), "a name for each fault");

// ------------------------------------------------ what the threads do ------------------------------------------------

enum class Kind { kWaitEmpty, kLoad, kWaitTurn, kWaitFull, kFinish, kRelease, kPassTurn };

struct Columns {  // of x and y, in a stage
  int row, col, step;
};

struct Operation {
  Kind kind;
  int stage, parity;
  int other;        // the block in which a stage is released; the consumer that gets the turn; the number of a load
  Columns columns;  // loaded, or multiplied
};

// CUTLASS's PipelineState, for a number of stages known at run time.
class State {
 public:
  State(int stages, int phase) : stages_(stages), phase_(phase) {}
  int index() const { return index_; }
  int phase() const { return phase_; }
  void operator++() { advance(1); }
  void advance(int count) {
    phase_ ^= (index_ + count) / stages_ & 1;
    index_ = (index_ + count) % stages_;
  }

 private:
  int stages_, phase_, index_ = 0;
};

// The pipeline, turns and matrix unit of one thread of block `block`: notes what is asked of them.
class Recorder {
 public:
  Recorder(const Size &size, Fault fault, int block, int consumer = 0)
      : size_(size), fault_(fault), block_(block), consumer_(consumer),
        turn_((fault == Fault::kBothTurnsOpen || consumer == 0) && fault != Fault::kNoTurnOpen) {}

  void producer_acquire(const State &state) {
    if (fault_ != Fault::kNoAcquire) add(Kind::kWaitEmpty, state.index(), state.phase());
  }
  void producer_tail(State state) {
    for (int i = 0; i < size_.stages && fault_ != Fault::kNoTail; ++i, ++state) {
      add(Kind::kWaitEmpty, state.index(), state.phase());
    }
  }
  void load(int stage, const Columns &columns) { add(Kind::kLoad, stage, 0, ++loads_, columns); }

  void consumer_wait(const State &state) { awaited_ = state; }
  void consumer_release(const State &state) {
    for (int i = 0; i < (fault_ == Fault::kReleaseOwnBlockOnly ? 1 : kCluster); ++i) {
      add(Kind::kRelease, state.index(), 0, (block_ + i) % kCluster);
    }
  }
  void issue(int stage, const Columns &columns) {
    add(Kind::kWaitFull, stage, awaited_.phase(), 0, columns);
    unfinished_.push_back(stage);
  }
  void finish_previous() {
    if (fault_ != Fault::kReleaseBeforePrevious) finish_all_but(1);
  }
  void finish_all() {
    if (fault_ != Fault::kReleaseBeforeLast) finish_all_but(0);
  }

  void wait() {
    if (fault_ != Fault::kNoTurns) add(Kind::kWaitTurn, 0, turn_);
    if (fault_ == Fault::kTurnPassedAtOnce) pass_turn();
  }
  void arrive() {
    if (fault_ != Fault::kNoTurns && fault_ != Fault::kTurnPassedAtOnce) pass_turn();
    turn_ ^= 1;
  }

  std::vector<Operation> operations;

 private:
  void add(Kind kind, int stage, int parity, int other = 0, const Columns &columns = {}) {
    operations.push_back({kind, stage, parity, other, columns});
  }
  void pass_turn() { add(Kind::kPassTurn, 0, 0, (consumer_ + 1) % kConsumers); }
  void finish_all_but(size_t count) {
    while (unfinished_.size() > count) {
      add(Kind::kFinish, unfinished_.front(), 0);
      unfinished_.erase(unfinished_.begin());
    }
  }

  Size size_;
  Fault fault_;
  int block_, consumer_;
  int turn_;  // the parity to wait for: the first wait of consumer 0 passes
  int loads_ = 0;
  State awaited_ = State(1, 0);
  std::vector<int> unfinished_;
};

// The tiles of a block: strips of a cluster lie one below the other.
class Tiles {
 public:
  Tiles(const Size &size, Fault fault, int block)
      : any_(1), rows_(kCluster * size.row_tiles), cols_(size.col_tiles + 1),
        grid_{int(rows_.size()), size.col_tiles, kCluster, 1, size.row_tiles, size.col_tiles},
        place_(betaclip::place_of(grid_, block)), rectangle_(betaclip::rectangle(grid_, place_)) {
    for (size_t row = 0; row < rows_.size(); ++row) rows_[row].y = size.lost_rows >> row & 1;
    for (betaclip::TileBits &col : cols_) col.w = size.lost_rows == 0;
    if (fault == Fault::kBlocksOfUnequalTiles && block == 1) ++rectangle_.row_end;
    if (fault == Fault::kBlocksInDifferentColumns && block == 1) ++rectangle_.col_begin, ++rectangle_.col_end;
    if (fault == Fault::kBlocksSkipDifferentTiles && block == 1 && size.lost_rows) any_ = 0;
  }

  betaclip::TileWalk<betaclip::LostTiles> walk() const {
    return {rectangle_, betaclip::LostTiles(grid_, place_, {&any_, rows_.data(), cols_.data()})};
  }

 private:
  int32_t any_;
  std::vector<betaclip::TileBits> rows_, cols_;
  betaclip::Grid grid_;
  betaclip::Place place_;
  betaclip::Rectangle rectangle_;
};

std::vector<Operation> loading_thread(const Size &size, Fault fault, int block) {
  Recorder recorder(size, fault, block);
  const Tiles tiles(size, fault, block);
  const auto load_tile = [&](const auto &walk) {
    return [&recorder, row = walk.row(), col = walk.col()](int step, const State &state) {
      recorder.load(state.index(), {row, col, step});
    };
  };
  betaclip::fill_stages(tiles.walk(), size.steps, recorder,
                        State(size.stages, fault != Fault::kProducerStartsLate), load_tile);
  return recorder.operations;
}

std::vector<Operation> consumer(const Size &size, Fault fault, int block, int which) {
  Recorder recorder(size, fault, block, which);
  const bool skips = fault != Fault::kStagesOfTheOtherNotSkipped;
  const State start(size.stages, fault == Fault::kConsumersStartEarly);
  betaclip::StageReader<Recorder, State, Recorder> reader(start, size.steps, skips ? which : 0, recorder, recorder);
  const Tiles tiles(size, fault, block);
  auto walk = tiles.walk();
  for (walk.skip(which); !walk.done(); walk.skip(kConsumers)) {
    int step = 0;
    const auto issue = [&](int stage) { recorder.issue(stage, {walk.row(), walk.col(), step++}); };
    reader.read_tile(issue, [&] { recorder.finish_previous(); }, [&] { recorder.finish_all(); });
  }
  return recorder.operations;
}

// --------------------------------------------- what they may do to each other ----------------------------------------

// A stage of one block. Shares are numbered by the block that loads them; 0 is none, n the n-th load of that block.
struct Stage {
  int8_t full_phase, full_arrivals, full_bytes;  // arrivals and shares of bytes still to come
  int8_t empty_phase, empty_arrivals;
  int8_t holds[kCluster], in_flight[kCluster];
  int8_t readers;  // bit number `agent` of each consumer whose products may be reading
};

struct Block {
  int8_t next[kAgents];  // operation
  int8_t turn_phase[kConsumers];
  Stage stages[kMaxStages];
};

struct Cluster {
  Block blocks[kCluster];
  bool operator==(const Cluster &other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(std::has_unique_object_representations_v<Cluster>, "compared and hashed by its bytes");

struct Hash {
  size_t operator()(const Cluster &cluster) const {
    return std::hash<std::string_view>()({reinterpret_cast<const char *>(&cluster), sizeof cluster});
  }
};

class Model {
 public:
  Model(const Size &size, Fault fault) : size_(size), fault_(fault) {
    for (int block = 0; block < kCluster; ++block) {
      threads_[block][0] = loading_thread(size, fault, block);
      for (int which = 0; which < kConsumers; ++which) {
        threads_[block][1 + which] = consumer(size, fault, block, which);
      }
      for (const Operation &operation : threads_[block][0]) {
        if (operation.kind == Kind::kLoad) loads_[block].push_back(operation.columns);
      }
    }
  }

  // What goes wrong in any interleaving, or nullptr; states counts what was visited.
  const char *search(size_t *states) {
    Cluster start = {};
    for (Block &block : start.blocks) {
      for (int i = 0; i < size_.stages; ++i) {
        block.stages[i].full_arrivals = 1;
        block.stages[i].empty_arrivals = empty_arrivals();
      }
    }
    std::unordered_set<Cluster, Hash> seen = {start};
    std::vector<Cluster> open = {start}, following;
    while (!open.empty() && !error_) {
      const Cluster cluster = open.back();
      open.pop_back();
      following.clear();
      for (int block = 0; block < kCluster; ++block) {
        for (int agent = 0; agent < kAgents; ++agent) act(cluster, block, agent, following);
        for (int stage = 0; stage < size_.stages; ++stage) {
          for (int share = 0; share < kCluster; ++share) deliver(cluster, block, stage, share, following);
        }
      }
      if (following.empty()) {
        for (int block = 0; block < kCluster; ++block) {
          if (!has_exited(cluster, block)) fail("deadlock");
        }
      }
      for (const Cluster &next : following) {
        if (seen.insert(next).second) open.push_back(next);
      }
    }
    *states = seen.size();
    return error_;
  }

 private:
  int empty_arrivals() const { return fault_ == Fault::kOneArrivalEmpties ? 1 : kCluster; }
  int shares_expected() const { return fault_ == Fault::kFewerBytesExpected ? 1 : kCluster; }
  void fail(const char *error) { error_ = error_ ? error_ : error; }

  bool has_exited(const Cluster &cluster, int block) const {
    for (int agent = 0; agent < kAgents; ++agent) {
      if (cluster.blocks[block].next[agent] < int(threads_[block][agent].size())) return false;
    }
    return true;
  }

  // The agent's next operation, if it need not wait, and those that follow at once.
  void act(Cluster cluster, int block, int agent, std::vector<Cluster> &following) {
    const std::vector<Operation> &operations = threads_[block][agent];
    int8_t &next = cluster.blocks[block].next[agent];
    const int end = int(operations.size());
    if (next == end || waits(cluster.blocks[block], agent, operations[next])) return;
    do {
      perform(cluster, block, agent, operations[next]);
      ++next;
    } while (next < end && (operations[next - 1].kind == Kind::kFinish || operations[next].kind == Kind::kLoad));
    following.push_back(cluster);
  }

  bool waits(const Block &block, int agent, const Operation &operation) const {
    const Stage &stage = block.stages[operation.stage];
    switch (operation.kind) {
      case Kind::kWaitEmpty:
        return stage.empty_phase == operation.parity;
      case Kind::kWaitFull:
        return stage.full_phase == operation.parity && fault_ != Fault::kNoWaitForLoads;
      case Kind::kWaitTurn:
        return block.turn_phase[agent - 1] == operation.parity;
      default:
        return false;
    }
  }

  void perform(Cluster &cluster, int block, int agent, const Operation &operation) {
    Stage &stage = cluster.blocks[block].stages[operation.stage];
    switch (operation.kind) {
      case Kind::kWaitEmpty:
      case Kind::kWaitTurn:
        break;
      case Kind::kLoad:
        load(cluster, block, operation);
        break;
      case Kind::kWaitFull:
        for (int share = 0; share < kCluster; ++share) check_columns(stage, block, share, operation.columns);
        stage.readers |= int8_t(1 << agent);
        break;
      case Kind::kFinish:
        stage.readers &= int8_t(~(1 << agent));
        break;
      case Kind::kRelease:
        release(cluster, operation.other, operation.stage);
        break;
      case Kind::kPassTurn:
        cluster.blocks[block].turn_phase[operation.other] ^= 1;
        break;
    }
  }

  // The loading thread announces what its block will receive, and sends its share.
  void load(Cluster &cluster, int block, const Operation &operation) {
    Stage &stage = cluster.blocks[block].stages[operation.stage];
    if (stage.full_arrivals == 0) fail("bytes are announced twice within a phase");
    --stage.full_arrivals;
    stage.full_bytes += int8_t(shares_expected());
    end_full_phase(stage);
    for (int to = 0; to < kCluster; ++to) {
      if (fault_ == Fault::kNoMulticast && to != block) continue;
      int8_t &in_flight = cluster.blocks[to].stages[operation.stage].in_flight[block];
      if (in_flight) fail("two loads of one place are under way");
      in_flight = int8_t(operation.other);
    }
  }

  void deliver(Cluster cluster, int block, int index, int share, std::vector<Cluster> &following) {
    Stage &stage = cluster.blocks[block].stages[index];
    if (!stage.in_flight[share]) return;
    if (has_exited(cluster, block)) fail("a load reaches a block after its exit");
    if (stage.readers) fail("a load overwrites a stage that products read");
    stage.holds[share] = stage.in_flight[share];
    stage.in_flight[share] = 0;
    --stage.full_bytes;
    end_full_phase(stage);
    following.push_back(cluster);
  }

  void check_columns(const Stage &stage, int block, int share, const Columns &wanted) {
    const bool loaded = stage.holds[share] > 0;
    const Columns held = loaded ? loads_[share][stage.holds[share] - 1] : Columns();
    const bool same_row = share != block || held.row == wanted.row;
    if (!loaded || !same_row || held.col != wanted.col || held.step != wanted.step) {
      fail("products read a stage that holds something else");
    }
  }

  void release(Cluster &cluster, int block, int index) {
    if (has_exited(cluster, block)) fail("an arrival at a block that has exited");
    Stage &stage = cluster.blocks[block].stages[index];
    if (--stage.empty_arrivals > 0) return;
    stage.empty_phase ^= 1;
    stage.empty_arrivals = int8_t(empty_arrivals());
  }

  static void end_full_phase(Stage &stage) {
    if (stage.full_arrivals > 0 || stage.full_bytes != 0) return;
    stage.full_phase ^= 1;
    stage.full_arrivals = 1;
  }

  Size size_;
  Fault fault_;
  std::vector<Operation> threads_[kCluster][kAgents];
  std::vector<Columns> loads_[kCluster];
  const char *error_ = nullptr;
};

}  // namespace

int main() {
  for (const Size &size : kSizes) {
    size_t states = 0;
    const char *error = Model(size, Fault::kNone).search(&states);
    std::printf("%d stages, %d x %d tiles of %d steps%s: %s in %zu states\n", size.stages, size.row_tiles,
                size.col_tiles, size.steps, size.lost_rows ? ", some skipped" : "", error ? error : "no fault", states);
    if (error) return 1;
  }
  for (int fault = 1; fault < int(Fault::kCount); ++fault) {
    const char *error = nullptr;
    size_t states = 0;
    for (const Size &size : kSizes) {
      if (!error) error = Model(size, Fault(fault)).search(&states);
    }
    std::printf("%s: %s\n", kNames[fault], error ? error : "NOT FOUND");
    if (!error) return 1;
  }
  return 0;
}
