// The order in which the loading thread and the consumers of a block pass the barriers of the ring of stages.
// kernel.cuh runs this code on CUTLASS's pipeline. tests/pipeline_model.cpp runs it on one that records, and searches
// every interleaving of what was recorded.
#pragma once

#include "tiles.h"

namespace betaclip {

// The loading thread: every tile of the walk, in `steps` stages each. load(walk) returns a function that starts the
// loads of one step, (step, state). The thread ends when the whole cluster has released every stage, so that no block
// exits while another may still arrive at its barriers or write to its memory.
template <class Walk, class Pipeline, class State, class Load>
BETACLIP_HD void fill_stages(Walk walk, int steps, Pipeline &pipeline, State state, const Load &load) {
  for (; !walk.done(); walk.next()) {
    const auto load_step = load(walk);
    BETACLIP_NO_UNROLL  // several steps at a time do not fit into the loading thread's registers
    for (int step = 0; step < steps; ++step, ++state) {
      pipeline.producer_acquire(state);
      load_step(step, state);
    }
  }
  pipeline.producer_tail(state);
}

// One consumer. Its stages are those of every other tile; state is that of the block's first tile.
template <class Pipeline, class State, class Turns>
class StageReader {
 public:
  BETACLIP_HD StageReader(State state, int steps, int which, Pipeline &pipeline, Turns &turns)
      : state_(state), steps_(steps), pipeline_(pipeline), turns_(turns) {
    state_.advance(which * steps);
  }

  // Reads one tile. issue(stage) starts the products of a stage; finish_previous() returns when all products but those
  // issued last have finished, finish_all() when all have. A stage is released when the products that read it have
  // finished, one step later than they were issued. The other consumer may start issuing while this one's last products
  // are under way, but not before: barriers know the parity of their phase alone, so a consumer that ran ahead could
  // take a stage that is two phases behind for its own.
  template <class Issue, class FinishPrevious, class FinishAll>
  BETACLIP_HD void read_tile(const Issue &issue, const FinishPrevious &finish_previous, const FinishAll &finish_all) {
    turns_.wait();
    State finished = state_;
    for (int step = 0; step < steps_; ++step, ++state_) {
      pipeline_.consumer_wait(state_);
      issue(state_.index());
      if (step > 0) {
        finish_previous();
        pipeline_.consumer_release(finished);
        ++finished;
      }
    }
    turns_.arrive();
    finish_all();
    pipeline_.consumer_release(finished);
    state_.advance((kConsumers - 1) * steps_);
  }

 private:
  State state_;
  int steps_;
  Pipeline &pipeline_;
  Turns &turns_;
};

}  // namespace betaclip
