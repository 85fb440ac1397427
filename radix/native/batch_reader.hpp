// Event batches from their bytes: the common part of what kv_events/wire.py says to be a batch.
//
// What is read here its decoder takes too, with equal content. Anything else (kinds, fields and encodings that our own
// workers do not write, damage, what is over a limit) is Uncommon, and left to that decoder. Prompt tokens are checked
// and passed over: whoever looks at them has that decoder read them.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "changes.hpp"

namespace radix {

// A row an event. Few events of few blocks lie in the batch itself.
class Batch : public Changes {
  public:
    std::string worker;
    uint64_t epoch = 0, seq = 0;
    double ts = 0;
    std::array<char, 16> digest{};

    Batch() {}  // leaves `own` unset
    Batch(Batch &&) = delete;

  private:
    friend class BatchReader;
    template <class T, size_t OWN> struct Column {
        T *data = own, own[OWN];
        size_t size = 0, capacity = OWN;
        std::unique_ptr<T[]> more;  // where `own` is too small

        operator std::span<const T>() const { return {data, size}; }
        T *extend(size_t count) {  // where to write `count` more
            if (size + count > capacity) {
                capacity = std::max(2 * capacity, size + count);
                std::unique_ptr<T[]> larger(new T[capacity]);
                std::memcpy(larger.get(), data, size * sizeof(T));
                more = std::move(larger);
                data = more.get();
            }
            return data + std::exchange(size, size + count);
        }
    };
    Column<uint64_t, 16> hashes_;
    Column<uint64_t, 4> parents_;
    Column<uint32_t, 4> ends_;
    Column<uint8_t, 8> kinds_, tiers_;
};

class BatchReader {
  public:
    // False where the bytes are Uncommon: `batch` is of no use then.
    static bool read(const uint8_t *data, size_t size, Batch &batch) {
        try {
            BatchReader(data, size, batch).read_batch();
            return true;
        } catch (const Uncommon &) {
            return false;
        }
    }

  private:
    // These are kv_events.wire's.
    static constexpr size_t MAX_PAYLOAD_BYTES = 8 << 20, MAX_EVENTS_PER_BATCH = 1 << 14;
    static constexpr size_t MAX_HASHES_PER_EVENT = 1 << 16, MAX_HASHES_PER_BATCH = 1 << 17;
    static constexpr size_t MAX_TOKENS_PER_BATCH = 1 << 20;
    static constexpr uint64_t MAX_BLOCK_SIZE = 1 << 20, MAX_HASH = ~uint64_t(0), MAX_COUNT = MAX_HASH >> 1;
    static constexpr uint64_t MAX_TOKEN = ~uint32_t(0);

    enum Field { TYPE, HASHES, PARENT, TOKENS, BLOCK_SIZE, LORA, MEDIUM, LORA_NAME, FIELDS };
    static constexpr std::string_view NAMES[FIELDS] = {
        "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"};
    static constexpr std::string_view KINDS[] = {"BlockStored", "BlockRemoved", "AllBlocksCleared"};
    static constexpr uint8_t NEEDED[] = {1 << TYPE | 1 << HASHES | 1 << BLOCK_SIZE, 1 << TYPE | 1 << HASHES, 1 << TYPE};
    static constexpr uint8_t OPTIONAL[] = {
        1 << PARENT | 1 << TOKENS | 1 << LORA | 1 << MEDIUM | 1 << LORA_NAME, 1 << MEDIUM, 0};
    static constexpr Field STORED_ORDER[] = {HASHES, PARENT, TOKENS, BLOCK_SIZE, LORA, MEDIUM, LORA_NAME};
    static constexpr Field REMOVED_ORDER[] = {HASHES, MEDIUM};
    static constexpr std::string_view MEDIUMS[TIERS] = {"GPU", "CPU", "DISK"};

    struct Uncommon {};
    struct Event {
        uint64_t parent = 0;
        uint8_t kind = 0, tier = 0, seen = 0;  // seen: a bit a field
    };

    BatchReader(const uint8_t *data, size_t size, Batch &batch) : at_(data), end_(data + size), batch_(batch) {}

    void read_batch() {
        expect(left() <= MAX_PAYLOAD_BYTES && array() == 8 && byte() == 0xcb);
        batch_.ts = std::bit_cast<double>(number(8));
        expect(std::isfinite(batch_.ts));
        const size_t events = array();
        expect(events <= MAX_EVENTS_PER_BATCH);
        for (size_t i = 0; i < events; i++) read_event();
        if (!nil()) integer(MAX_HASH);  // data_parallel_rank
        expect(integer(1) == 1);        // version
        batch_.worker = text();
        expect(!batch_.worker.empty());
        for (const char letter : batch_.worker) expect(!(letter & 0x80));  // what is not ASCII may not be UTF-8
        batch_.epoch = integer(MAX_COUNT);
        expect(batch_.epoch > 0);
        batch_.seq = integer(MAX_COUNT);
        expect(byte() == 0xc4 && byte() == sizeof batch_.digest);
        std::memcpy(batch_.digest.data(), take(sizeof batch_.digest), sizeof batch_.digest);
        expect(left() == 0);
        batch_.kinds = batch_.kinds_;
        batch_.tiers = batch_.tiers_;
        batch_.parents = batch_.parents_;
        batch_.ends = batch_.ends_;
        batch_.hashes = batch_.hashes_;
    }

    void read_event() {
        Event event;
        if (next_is(0x80, 0xf0)) {
            size_t field = 0;  // fields come in the order of NAMES more often than not
            for (size_t fields = byte() & 0xf; fields > 0; fields--, field = (field + 1) % FIELDS) {
                const std::string_view name = text();
                for (size_t tried = 0; name != NAMES[field]; field = (field + 1) % FIELDS) expect(++tried < FIELDS);
                read_field(static_cast<Field>(field), event);
            }
        } else {
            const size_t fields = array();
            expect(fields > 0);
            read_field(TYPE, event);
            const auto order = event.kind == STORE ? std::span<const Field>(STORED_ORDER) : REMOVED_ORDER;
            expect(fields - 1 <= order.size());
            for (const Field field : order.first(fields - 1)) read_field(field, event);
        }
        const int needed = NEEDED[event.kind], known = needed | OPTIONAL[event.kind];
        expect((event.seen & needed) == needed && (event.seen | known) == known);
        *batch_.kinds_.extend(1) = event.kind;
        *batch_.tiers_.extend(1) = event.tier;
        *batch_.parents_.extend(1) = event.parent;
        *batch_.ends_.extend(1) = static_cast<uint32_t>(batch_.hashes_.size);
    }

    void read_field(Field field, Event &event) {
        expect(!(event.seen >> field & 1));
        event.seen |= static_cast<uint8_t>(1 << field);
        switch (field) {
            case TYPE: event.kind = one_of(KINDS); break;
            case HASHES: read_hashes(); break;
            case PARENT: event.parent = nil() ? 0 : integer(MAX_HASH); break;
            case TOKENS: pass_tokens(); break;
            case BLOCK_SIZE: integer(MAX_BLOCK_SIZE); break;
            case MEDIUM: event.tier = nil() ? 0 : one_of(MEDIUMS); break;
            case LORA: case LORA_NAME: expect(nil()); break;
            case FIELDS: break;
        }
    }

    void read_hashes() {
        const size_t count = array();
        expect(count <= MAX_HASHES_PER_EVENT && batch_.hashes_.size + count <= MAX_HASHES_PER_BATCH && count <= left());
        bool zero = false;  // it stands for the root
        for (uint64_t *hash = batch_.hashes_.extend(count), *end = hash + count; hash < end; hash++) {
            *hash = integer(MAX_HASH);
            zero |= *hash == 0;
        }
        expect(!zero);
    }

    void pass_tokens() {
        const size_t count = array();
        expect(count <= MAX_TOKENS_PER_BATCH - tokens_);
        tokens_ += count;
        for (size_t i = 0; i < count; i++) integer(MAX_TOKEN);
    }

    static void expect(bool common) {
        if (!common) [[unlikely]] throw Uncommon();
    }
    size_t left() const { return static_cast<size_t>(end_ - at_); }
    bool next_is(uint8_t code, uint8_t mask = 0xff) const { return left() > 0 && (*at_ & mask) == code; }
    const uint8_t *take(size_t bytes) {
        expect(bytes <= left());
        return std::exchange(at_, at_ + bytes);
    }
    uint8_t byte() { return *take(1); }
    uint64_t number(size_t bytes) {  // big-endian; one load and a swap where `bytes` is a constant
        const uint8_t *from = take(bytes);
        uint64_t value = 0;
        for (size_t i = 0; i < bytes; i++) value = value << 8 | from[i];
        return value;
    }
    bool nil() {
        const bool found = next_is(0xc0);
        at_ += found;
        return found;
    }
    uint64_t integer(uint64_t most) {
        const uint8_t first = byte();
        expect(first < 0x80 || (first >= 0xcc && first <= 0xcf));
        const uint64_t value = first < 0x80 ? first : first == 0xcf ? number(8) : number(1u << (first - 0xcc));
        expect(value <= most);
        return value;
    }
    size_t array() {  // its length
        const uint8_t first = byte();
        expect(first >> 4 == 0x9 || first == 0xdc || first == 0xdd);
        return first >> 4 == 0x9 ? first & 0xf : number(first == 0xdc ? 2 : 4);
    }
    std::string_view text() {
        const uint8_t first = byte();
        expect(first >> 5 == 0x5 || first == 0xd9);
        const size_t size = first == 0xd9 ? byte() : first & 0x1f;
        return {reinterpret_cast<const char *>(take(size)), size};
    }
    uint8_t one_of(std::span<const std::string_view> names) {
        const auto found = std::find(names.begin(), names.end(), text());
        expect(found != names.end());
        return static_cast<uint8_t>(found - names.begin());
    }

    const uint8_t *at_, *const end_;
    size_t tokens_ = 0;  // so far
    Batch &batch_;
};

}  // namespace radix
