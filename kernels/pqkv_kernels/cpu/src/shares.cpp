// Runs shares of a job on the threads that torch computes with, for `in_shares` of cpu/build.py.
//
// GOMP_parallel is what compilers call for `#pragma omp parallel`. It is declared and not linked, so that it comes from the
// OpenMP runtime that torch has loaded: another one, or threads of our own, would compete for the processors with torch's
// threads, which keep them busy for a while after every operation.

#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

namespace {

typedef int (*Work)(const void* job, int64_t begin, int64_t end);

struct Shares {
  Work work;
  const void* job;
  int64_t count, shares;
  std::atomic<int64_t> next;  // the first share that no thread has taken yet
  std::atomic<int> failed;
};

// What every thread does: take shares until there are none.
void take_shares(void* data) {
  Shares& all = *static_cast<Shares*>(data);
  for (int64_t i = all.next++; i < all.shares; i = all.next++)
    if (all.work(all.job, all.count * i / all.shares, all.count * (i + 1) / all.shares)) all.failed = 1;
}

}  // namespace

// Calls work(job, begin, end) for equal shares of 0..count-1 on up to `threads` threads; returns 1 where a call did not return
// 0.
extern "C" int pqkv_shares(Work work, const void* job, int64_t count, int64_t shares, unsigned threads) {
  Shares all{work, job, count, shares, {0}, {0}};
  GOMP_parallel(take_shares, &all, threads, 0);
  return all.failed;
}
