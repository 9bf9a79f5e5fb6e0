// What the runtime tells the sanitizer that the process has, if any.
#pragma once
#include <cstddef>

extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
#undef WEAK
}

namespace cusim {

// fake_stack: where the one that leaves keeps ASan's; null where it never comes back.
inline void start_switch(void** fake_stack, const void* to_stack, size_t size, void* to_tsan_fiber) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(fake_stack, to_stack, size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to_tsan_fiber, 1);  // 1: the switch orders nothing
}
inline void finish_switch(void* fake_stack, const void** from_stack = nullptr, size_t* from_size = nullptr) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, from_stack, from_size);
}

inline void poison(const void* p, size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, size);
}
inline void unpoison(const void* p, size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, size);
}

// What came before a release of a tag is ordered before what comes after its acquire.
inline void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}
inline void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}

// While one lives, ThreadSanitizer takes no notice of the runtime's own memory, which it sees where
// memcpy and operator new are called. Of reads and writes, that is: the function's name is older.
struct Unseen {
  Unseen() {
    if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
};

}  // namespace cusim
