// The blocks that follow a block. Most blocks have one child or none: that fits into the node; others get a hub.
#pragma once
#include <algorithm>
#include <deque>
#include <vector>

#include "table.hpp"

namespace radix {

class Children {
  public:
    explicit Children(size_t capacity) : link_(capacity) {}

    bool empty(uint32_t parent) const { return !link_[parent]; }
    size_t size(uint32_t parent) const {
        const uint32_t link = link_[parent];
        return link & HUB ? hubs_[link & ~HUB].size() : link != 0;
    }
    template <class Do> void for_each(uint32_t parent, Do act) const {
        const uint32_t link = link_[parent];
        if (link & HUB) std::for_each(hubs_[link & ~HUB].begin(), hubs_[link & ~HUB].end(), act);
        else if (link) act(link - 1);
    }
    void add(uint32_t parent, uint32_t child) {
        uint32_t &link = link_[parent];
        if (!link) {
            link = child + 1;
            return;
        }
        if (!(link & HUB)) {
            uint32_t hub = static_cast<uint32_t>(hubs_.size());
            if (free_.empty()) hubs_.emplace_back();
            else hub = free_.back(), free_.pop_back();
            hubs_[hub].push_back(link - 1);
            link = hub | HUB;
        }
        Hub &hub = hubs_[link & ~HUB];
        hub.insert(std::lower_bound(hub.begin(), hub.end(), child), child);
    }
    void remove(uint32_t parent, uint32_t child) {
        uint32_t &link = link_[parent];
        if (!(link & HUB)) {
            link = 0;
            return;
        }
        const uint32_t number = link & ~HUB;
        Hub &hub = hubs_[number];
        hub.erase(std::lower_bound(hub.begin(), hub.end(), child));
        if (hub.size() * 4 < hub.capacity()) hub.shrink_to_fit();
        if (hub.size() > 1) return;
        link = hub.front() + 1;
        hub = {};
        free_.push_back(number);
    }
    void move(uint32_t from, uint32_t to) {
        link_[to] = link_[from];
        link_[from] = 0;
    }
    RADIX_INLINE void prefetch(uint32_t parent) const { __builtin_prefetch(&link_[parent]); }
    bool committed(size_t end) const { return link_.committed(end); }
    void commit(size_t end) { link_.commit(end); }
    void trim(size_t end) { link_.trim(end); }

  private:
    static constexpr uint32_t HUB = 1u << 31;
    using Hub = std::vector<uint32_t>;  // ascending

    Region<uint32_t> link_;  // 0, a child + 1, or HUB | number
    std::deque<Hub> hubs_;
    std::vector<uint32_t> free_;
};

}  // namespace radix
