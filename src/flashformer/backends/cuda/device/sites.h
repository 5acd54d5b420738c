// One name per place in the kernel where threads or proxies are ordered. On a GPU a site costs nothing; the host build
// counts how often each one ran, names it in its findings, and can switch it off: a mutant without a compiler.
#pragma once

#include "layout.cuh"

// X(name, what it orders)
#define FF_SITES(X)                                                                        \
  X(kInitFence, "mbarriers are initialised for the copy engine")                           \
  X(kInitBar, "mbarriers are initialised for all threads of the block")                    \
  X(kWaitEmpty, "producer: all consumer warps have left the slot")                         \
  X(kProducerFence, "producer: their reads come before the copy that overwrites")          \
  X(kExpect, "producer: arrival, and the bytes that are to come")                          \
  X(kWaitFull, "consumer: the bytes of the slot have come")                                \
  X(kSlotWarp, "consumer: all lanes of the warp have read the slot")                       \
  X(kSlotRelease, "consumer: the warp leaves the slot")                                    \
  X(kDrain, "producer: copies under way have ended before the block does")                 \
  X(kHandoffPoll, "thread 0: all blocks have arrived")                                     \
  X(kHandoffBar, "the block learns what thread 0 saw, and has the records of the phase")   \
  X(kPhaseBar, "all threads of the block have stored the results of the phase")            \
  X(kHandoffFence, "thread 0: they are visible to the GPU")                                \
  X(kHandoffArrive, "thread 0: the block arrives")                                         \
  X(kSumsBar, "sums of squares, one per warp, are in shared memory")                       \
  X(kFactorsBar, "factors of the norm are in shared memory")                               \
  X(kScaleBar, "largest values of a slice, one per warp, are in shared memory")            \
  X(kStageBar, "a slice of x is in shared memory")                                         \
  X(kPartialBar, "partial sums of a tile are in shared memory")                            \
  X(kBadBar, "the first bad place of each warp is in shared memory")                       \
  X(kAbortClaim, "who writes the abort record")                                            \
  X(kQkFactorsBar, "factors of q and k norms over all heads are in shared memory")         \
  X(kQueryBar, "the unit's keys and values are appended, its queries in shared memory")    \
  X(kScoresBar, "the scores of a chunk are in shared memory")                              \
  X(kWeightsWarp, "all lanes have read the scores of a column that its weights overwrite") \
  X(kWeightsBar, "the weights of a chunk are in shared memory")                            \
  X(kPartsBar, "the parts of weighted values are in shared memory")                        \
  X(kMergeStored, "the block has stored its chunk's results")                              \
  X(kMergeFence, "thread 0: they are visible to the GPU")                                  \
  X(kMergeArrive, "thread 0: arrives, and sees how many have before")                      \
  X(kMergeSeen, "thread 0 of the last block: it learns of their chunks")                   \
  X(kMergeBar, "the block learns whether it was the last")                                 \
  X(kMergeWarp, "all lanes have the weights of chunks, and values that are overwritten")   \
  X(kChooseSum, "sums of each warp are in shared memory")                                  \
  X(kChooseMax, "maxima of each warp are in shared memory")                                \
  X(kChooseBest, "the best token of each warp is in shared memory")                        \
  X(kSampleAdjusted, "penalties and biases are in the logits")                             \
  X(kSampleUnit, "all threads have left the memory of a row's choice")

namespace flashformer {

#define FF_SITE_ENUM(name, what) name,
enum class Site : u32 { FF_SITES(FF_SITE_ENUM) kCount };
#undef FF_SITE_ENUM

}  // namespace flashformer
