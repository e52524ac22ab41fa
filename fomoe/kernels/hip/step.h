// What changes from one pass to the next: one block per device, written by a copy before the pass,
// so that a captured graph stays valid. fomoe/kernels/gpu/step.py has the same layout for numpy.
#pragma once

struct fm_step {
    int token;                 // decode: the id of the token that enters
    int position;              // tokens that the sequence had before this pass
    int tokens;                // tokens of this pass: 1 in decode
    int reserved;
    unsigned long long state;  // device address of the sequence's state
};
