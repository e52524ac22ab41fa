// The group that finishes last goes on with what the others have written.
#pragma once

// Whether all `groups` groups that share `counter` have come here; the last sets it back to 0.
//
// What any thread of the group wrote before is visible to every thread of the last group after it.
// `flag` is shared memory.
FM_DEV bool is_last_group(unsigned* counter, unsigned groups, int* flag) {
  fm_fence();
  fm_barrier();
  if (threadIdx.x == 0) {
    const bool last = fm_atomic_add(counter, 1) == groups - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  fm_barrier();
  const bool last = *flag != 0;
  if (last) fm_fence();
  return last;
}
