// Sets of holders, each kept once: few are different, and blocks share them.
//
// A member is a worker and the tiers in which it holds the block: worker << TIERS | bit mask. Members are ascending.
#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "changes.hpp"
#include "table.hpp"

namespace radix {

using Members = std::span<const uint32_t>;
constexpr uint32_t TIER_MASK = (1u << TIERS) - 1;

class HolderSets {
  public:
    static constexpr uint32_t EMPTY = 0;

    HolderSets(size_t capacity, uint64_t seed)
        : sets_(capacity + 1), contents_(capacity + 1), index_(contents_, capacity, seed) {}
    ~HolderSets() {
        for (uint32_t set = 0; set < size_; set++) delete[] sets_[set].members;
    }
    Members members(uint32_t set) const { return {sets_[set].members, sets_[set].count}; }
    uint32_t blocks(uint32_t set) const { return sets_[set].blocks; }
    uint32_t size() const { return size_; }  // set numbers are below this

    // The tiers in which `worker` is in the set; 0 when it is not.
    uint32_t mask(uint32_t set, uint32_t worker) const {
        const Members members = this->members(set);
        if (members.size() == 1) return members[0] >> TIERS == worker ? members[0] & TIER_MASK : 0;
        const auto at = std::lower_bound(members.begin(), members.end(), worker << TIERS);
        return at != members.end() && *at >> TIERS == worker ? *at & TIER_MASK : 0;
    }
    // The set that differs in `worker`, which is in it in the tiers of `mask`. To be held at once.
    uint32_t with(uint32_t set, uint32_t worker, uint32_t mask) {
        const uint32_t member = worker << TIERS | mask;
        Step &step = memo_[(set * 0x9E3779B1u ^ member * 0x85EBCA6Bu) >> 20];
        if (step.member == member && step.from == set && step.from_life == sets_[set].life &&
            step.to_life == sets_[step.to].life)
            return step.to;
        next_.assign(members(set).begin(), members(set).end());
        auto at = std::lower_bound(next_.begin(), next_.end(), worker << TIERS);
        if (at != next_.end() && *at >> TIERS == worker) at = next_.erase(at);
        if (mask) next_.insert(at, member);
        const uint32_t to = intern(next_);
        step = {member, set, to, sets_[set].life, sets_[to].life};
        return to;
    }
    void hold(uint32_t set) { sets_[set].blocks++; }  // by one block more
    void drop(uint32_t set) {
        if (--sets_[set].blocks || set == EMPTY) return;
        index_.erase(index_.place(contents_[set]), set);
        delete[] sets_[set].members;
        sets_[set] = {nullptr, 0, 0, sets_[set].life + 1};
        free_.push_back(set);
    }

  private:
    struct Set {
        const uint32_t *members;
        uint32_t count;
        uint32_t blocks;  // that have it
        uint32_t life;    // counts the sets that had this number
    };
    struct Step {  // a change of a set that was made before
        uint32_t member = 0, from = 0, to = 0, from_life = NONE, to_life = NONE;
    };

    uint32_t intern(Members members) {
        if (members.empty()) return EMPTY;
        uint64_t content = members.size();
        for (const uint32_t member : members) content = index_.place(content ^ member);
        const uint64_t place = index_.place(content);
        const uint32_t same = index_.find(place, [&](uint32_t set) {
            return contents_[set] == content && std::ranges::equal(this->members(set), members);
        });
        if (same != NONE) return same;
        uint32_t set = size_;
        if (free_.empty()) size_++;
        else set = free_.back(), free_.pop_back();
        uint32_t *copy = new uint32_t[members.size()];
        std::ranges::copy(members, copy);
        sets_[set].members = copy;
        sets_[set].count = static_cast<uint32_t>(members.size());
        contents_[set] = content;
        index_.insert(place, set);
        return set;
    }

    Region<Set> sets_;
    uint32_t size_ = 1;
    std::vector<uint32_t> free_;
    Region<uint64_t> contents_;  // hash of the members
    Table index_;
    std::vector<uint32_t> next_;  // scratch
    std::vector<Step> memo_ = std::vector<Step>(4096);
};

}  // namespace radix
