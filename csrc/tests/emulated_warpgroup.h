// A warpgroup on the CPU: 128 fibers that meet in shuffles and barriers as threads do.
//
// The 32 lanes of a warp advance together from one collective operation to the next, in random order; so do warps, each
// as far ahead of the others as barriers let it. A missing barrier thus shows as a wrong result for some seed, and
// lanes of one warp in different operations as an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace emulation {

constexpr int kThreads = 128;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr size_t kStackBytes = 32 * 1024;

[[noreturn]] inline void fail(const char *what) {
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

class Warpgroup {
 public:
  // What a thread sees: the interface of betaclip's DeviceWarpgroup.
  class Thread {
   public:
    Thread(Warpgroup &group, int index) : group_(group), index_(index) {}
    int thread() const { return index_; }

    template <class Value>
    Value shuffle_xor(Value value, int mask) {
      static_assert(sizeof(Value) == sizeof(uint32_t), "one register");
      Fiber &fiber = group_.fibers_[index_];
      const int parity = fiber.shuffles++ % 2;  // words of the last shuffle may still be read
      std::memcpy(&fiber.words[parity], &value, sizeof value);
      group_.leave(index_, State::kShuffle);
      std::memcpy(&value, &group_.fibers_[index_ ^ mask].words[parity], sizeof value);
      return value;
    }

    void sync() { group_.leave(index_, State::kBarrier); }

   private:
    Warpgroup &group_;
    int index_;
  };

  explicit Warpgroup(unsigned seed) : random_(seed) {}

  // Runs `body` in every thread until all have returned.
  void run(const std::function<void(Thread &)> &body) {
    body_ = &body;
    fibers_ = std::vector<Fiber>(kThreads);
    for (int i = 0; i < kThreads; ++i) prepare(i);
    State states[kWarps] = {};
    for (;;) {
      int ready[kWarps], count = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        if (states[warp] == State::kReady || states[warp] == State::kShuffle) ready[count++] = warp;
      }
      if (count > 0) {
        const int warp = ready[random_() % count];
        states[warp] = advance(warp);
        continue;
      }
      if (states[0] == State::kDone || states[0] != states[1] || states[0] != states[2] || states[0] != states[3]) {
        for (const State state : states) {
          if (state != State::kDone) fail("a warp returned, another waits at a barrier");
        }
        return;
      }
      std::fill(states, states + kWarps, State::kReady);
    }
  }

 private:
  enum class State { kReady, kShuffle, kBarrier, kDone };

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::kReady;
    uint32_t words[2];
    int shuffles = 0;
  };

  static void enter(unsigned high, unsigned low, int index) {
    auto *self = reinterpret_cast<Warpgroup *>(uintptr_t(high) << 32 | low);
    Thread thread(*self, index);
    (*self->body_)(thread);
    self->leave(index, State::kDone);
  }

  void prepare(int index) {
    Fiber &fiber = fibers_[index];
    fiber.stack.reset(new char[kStackBytes]);  // not initialised: most of it is never touched
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&enter), 3, unsigned(self >> 32), unsigned(self), index);
  }

  void leave(int index, State state) {
    fibers_[index].state = state;
    swapcontext(&fibers_[index].context, &scheduler_);
  }

  // One warp to its next collective operation.
  State advance(int warp) {
    int lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = warp * kLanes + i;
    std::shuffle(lanes, lanes + kLanes, random_);
    for (const int lane : lanes) swapcontext(&scheduler_, &fibers_[lane].context);
    for (const int lane : lanes) {
      if (fibers_[lane].state != fibers_[lanes[0]].state) fail("lanes of a warp meet in different operations");
    }
    return fibers_[lanes[0]].state;
  }

  const std::function<void(Thread &)> *body_ = nullptr;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  std::mt19937 random_;
};

}  // namespace emulation
