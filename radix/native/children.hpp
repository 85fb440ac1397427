// The blocks that follow a block. Most blocks have one child or none: that fits into the node; others get a hub.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>


namespace radix {

class Children {
  public:
    using Link = uint32_t;  // 0, a child + 1, or HUB | number

    static bool empty(Link link) { return !link; }
    size_t size(Link link) const { return link & HUB ? hubs_[link & ~HUB].size() : link != 0; }
    template <class Do> void for_each(Link link, Do act) const {
        if (link & HUB) std::for_each(hubs_[link & ~HUB].begin(), hubs_[link & ~HUB].end(), act);
        else if (link) act(link - 1);
    }
    void add(Link &link, uint32_t child) {
        if (!link) {
            link = child + 1;
            return;
        }
        if (!(link & HUB)) {
            uint32_t number = static_cast<uint32_t>(hubs_.size());
            if (free_.empty()) hubs_.emplace_back();
            else number = free_.back(), free_.pop_back();
            hubs_[number].push_back(link - 1);
            link = number | HUB;
        }
        Hub &hub = hubs_[link & ~HUB];
        hub.insert(std::lower_bound(hub.begin(), hub.end(), child), child);
    }
    void remove(Link &link, uint32_t child) {
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

  private:
    static constexpr uint32_t HUB = 1u << 31;
    using Hub = std::vector<uint32_t>;  // ascending

    std::deque<Hub> hubs_;
    std::vector<uint32_t> free_;
};

}  // namespace radix
