// What threads wait at: barriers, collectives of a warp, and what is said of those that wait in vain. A part of
// cusim.cpp, which alone includes it.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "fibers.h"

namespace cusim {
namespace {

// Returns the tag to acquire after the wait.
void* arrive(Barrier& b, State state, const char* name, int predicate, Site site) {
  const Unseen unseen;
  Fiber* f = self;
  leave_exchange(f);
  set_state(*f, state);
  f->at = name;
  f->site = site;
  if (!b.sync.arrived) b.site = site;
  if (!same(b.site, site)) {
    set_error("threads wait at different barriers: " + describe(*f) + "; others are at " + site_text(b.site));
    return nullptr;
  }
  void* tag = &b.sync.tags[b.sync.generation & 1];
  release(tag);
  b.count += predicate != 0;
  if (++b.sync.arrived == b.threads.size()) {
    for (Fiber& t : b.threads) set_state(t, State::kReady);
    b.last_count = b.count;
    b.count = 0;
    b.sync.arrived = 0;
    ++b.sync.generation;
  }
  return tag;
}

int wait_at(Barrier& b, State state, const char* name, int predicate, Site site) {
  void* tag = arrive(b, state, name, predicate, site);
  if (failed) abandon();
  yield();
  acquire(tag);
  return b.last_count;
}

unsigned present(const Warp& warp) { return ~0u >> (32 - warp.lanes.size()); }

bool same_collective(const Fiber& f, const Fiber& other) {
  return other.mask == f.mask && same(other.at, f.at) && same(other.site, f.site);
}

// Whether all lanes that f names, and that do not run, are at f's collective, as the first of them shows: what nearly
// every lane finds, 32 of which would else look at each other.
bool joins_those_alike(const Fiber& f) {
  Warp& warp = *f.warp;
  const unsigned bit = 1u << f.lane, others = f.mask & ~bit & present(warp) & ~warp.ready;
  if (!(f.mask & bit) || (f.mask & ~present(warp) && f.mask != ~0u) || others & ~warp.alike) return false;
  if (others && !same_collective(f, *warp.first_alike)) return false;
  if (!others) {
    warp.first_alike = &f;
    warp.alike = 0;
  }
  warp.alike |= bit;
  return true;
}

// What is wrong with the collective that f waits at; empty: nothing yet.
std::string mismatch(const Fiber& f) {
  if (!(f.mask >> f.lane & 1)) return "the mask leaves out its own lane: " + describe(f);
  // All 32 lanes is what a kernel names that does not know of a last, partial warp.
  if (f.mask & ~present(*f.warp) && f.mask != ~0u) {
    return "the mask names lanes that the block does not have: " + describe(f);
  }
  for (const Fiber& other : f.warp->lanes) {
    if (!(f.mask >> other.lane & 1) || other.state == State::kReady) continue;
    if (other.state != State::kInWarp) {
      return "a lane that the mask names cannot come: " + describe(f) + "; " + describe(other);
    }
    if (!same_collective(f, other)) {
      return "lanes that the mask names are elsewhere: " + describe(f) + "; " + describe(other);
    }
  }
  return "";
}

// The last lane to arrive hands every one the words of all.
void complete_exchange(Warp& warp, unsigned mask, int n) {
  auto& all = warp.exchanges;
  auto free = std::find_if(all.begin(), all.end(), [](const auto& e) { return e->readers == 0; });
  if (free == all.end()) free = all.insert(all.end(), std::make_unique<Exchange>());
  Exchange& e = **free;
  for (Fiber& f : warp.lanes) {
    if (!(mask >> f.lane & 1)) continue;
    std::copy_n(f.words, n, e.slots[f.lane]);
    ++e.readers;
    f.exchange = &e;
    set_state(f, State::kReady);
  }
  warp.alike &= ~mask;
}

void enter_exchange(const char* name, unsigned mask, const uint64_t* words, int n, Site site) {
  const Unseen unseen;
  Fiber* f = self;
  leave_exchange(f);
  set_state(*f, State::kInWarp);
  f->at = name;
  f->site = site;
  f->mask = mask;
  std::copy_n(words, n, f->words);
  if (!joins_those_alike(*f)) {
    const std::string wrong = mismatch(*f);
    if (!wrong.empty()) return set_error(wrong);
  }
  if (!(mask & f->warp->ready)) complete_exchange(*f->warp, mask, n);
}

// Whether `f`, which waits, waits for `other`.
bool waits_for(const Fiber& f, const Fiber& other) {
  switch (f.state) {
    case State::kInWarp:
      return other.warp == f.warp && (f.mask >> other.lane & 1) && other.state != State::kInWarp;
    case State::kInBlock:
      return other.block == f.block && other.state != State::kInBlock;
    case State::kInCluster:
      return other.state != State::kInCluster;
    default:
      return false;
  }
}

std::string deadlock_text() {
  std::string text;
  for (const Fiber& f : current->fibers) {
    for (const Fiber& other : current->fibers) {
      if (!waits_for(f, other)) continue;
      // The end of a chain of waiting is one that has returned.
      if (text.empty() || other.state == State::kReturned) {
        text = "deadlock: " + describe(f) + "; it waits for: " + describe(other);
      }
      if (other.state == State::kReturned) return text;
    }
  }
  return text;
}

}  // namespace
}  // namespace cusim
