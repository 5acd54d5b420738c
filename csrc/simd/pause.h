// For spin loops.
#pragma once

namespace flashformer {

// Tells the core that this is a wait: the other hardware thread gets its turn, and less power is drawn.
inline void pause() { __builtin_ia32_pause(); }

}  // namespace flashformer
