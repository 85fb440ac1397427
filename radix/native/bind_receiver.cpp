// KV blocks out of a socket into their slots, digested piece by piece while they are in the first caches. Received as a
// whole first, they had left them, and digests took a third of a puller's time. All of the loop is here: a call from
// Python for each small piece costs as much as it gains.
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <chrono>
#include <memory>
#include <vector>

#include "blocks.hpp"

namespace radix {
namespace {

constexpr size_t WINDOW_BYTES = 128 << 10;  // in one call: half of a small second cache, with what the kernel copies from
constexpr size_t MAX_PIECES = 1024;         // in one call: Linux takes no more

// Where the next byte goes. Blocks are received and digested in the order of `slots`.
struct Place {
    size_t block = 0, plane = 0, at = 0;

    void forward(const Pool &pool, size_t bytes) {
        at += bytes;
        if (at < pool.piece_bytes) return;
        at = 0;
        if (++plane == pool.planes) plane = 0, block++;
    }
};

class Digesting {
  public:
    virtual ~Digesting() = default;
    // As many stripes of what came as can be taken.
    virtual void take(const Pool &pool, const std::vector<uint32_t> &slots, size_t came) = 0;
    std::vector<uint64_t> digests;
};

template <class State> class DigestingWith final : public Digesting {
  public:
    void take(const Pool &pool, const std::vector<uint32_t> &slots, size_t came) override {
        while (came - taken_ >= xxh3::STRIPE) {
            const uint8_t *from = pool.piece(next_.plane, slots[next_.block]) + next_.at;
            const size_t here = std::min(came - taken_, pool.piece_bytes - next_.at) / xxh3::STRIPE;
            const bool last = next_.plane + 1 == pool.planes && next_.at + here * xxh3::STRIPE == pool.piece_bytes;
            state_.stripes(from, here - last, nullptr);
            if (last) {
                const uint8_t *end = from + (here - 1) * xxh3::STRIPE;
                digests.push_back(state_.finish(end, nullptr, pool.planes * pool.piece_bytes));
                state_ = State();
            }
            taken_ += here * xxh3::STRIPE;
            next_.forward(pool, here * xxh3::STRIPE);
        }
    }

  private:
    State state_;
    Place next_;
    size_t taken_ = 0;
};

std::unique_ptr<Digesting> new_digesting() {
#ifdef RADIX_XXH3_AVX2
    if (has_avx2()) return std::make_unique<DigestingWith<xxh3::Avx2>>();
#endif
    return std::make_unique<DigestingWith<xxh3::Portable>>();
}

// `receive`: 0 when all came, when nothing more came in the socket's own time or `seconds` are over; the error's number;
// -1 at the stream's end. Whoever calls looks at `came`, and calls again.
class BlockReceiver {
  public:
    BlockReceiver(nb::object pool, nb::handle slots)
        : pool_(pool, "pool", true), owner_(std::move(pool)), digesting_(new_digesting()) {
        const ArrayArgument<uint32_t> numbers(slots, "slots", "a one-dimensional array of uint32");
        pool_.check("slots", numbers.span());
        slots_.assign(numbers.span().begin(), numbers.span().end());
        due_ = slots_.size() * pool_.planes * pool_.piece_bytes;
    }

    int receive(int descriptor, double seconds) {
        nb::gil_scoped_release released;
        const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
        while (came < due_) {
            iovec pieces[MAX_PIECES];
            msghdr message{};
            message.msg_iov = pieces;
            const size_t wanted = window(pieces, message.msg_iovlen);
            const ssize_t got = recvmsg(descriptor, &message, MSG_WAITALL);
            if (got < 0) return errno;
            if (got == 0) return -1;
            arrived(static_cast<size_t>(got));
            if (static_cast<size_t>(got) < wanted || std::chrono::steady_clock::now() > end) break;
        }
        return 0;
    }

    nb::object digests() const {
        uint64_t *data;
        nb::object result = new_array({static_cast<npy_intp>(digesting_->digests.size())}, NPY_UINT64, &data);
        std::copy(digesting_->digests.begin(), digesting_->digests.end(), data);
        return result;
    }

    size_t came = 0;

  private:
    template <class Count> size_t window(iovec *pieces, Count &count) const {
        size_t bytes = 0, used = 0;
        for (Place place = next_; came + bytes < due_ && bytes < WINDOW_BYTES && used < MAX_PIECES; used++) {
            const size_t size = std::min(pool_.piece_bytes - place.at, WINDOW_BYTES - bytes);
            pieces[used] = {pool_.piece(place.plane, slots_[place.block]) + place.at, size};
            bytes += size;
            place.forward(pool_, size);
        }
        count = static_cast<Count>(used);
        return bytes;
    }

    void arrived(size_t bytes) {
        came += bytes;
        while (bytes) {
            const size_t here = std::min(bytes, pool_.piece_bytes - next_.at);
            next_.forward(pool_, here);
            bytes -= here;
        }
        digesting_->take(pool_, slots_, came);
    }

    Pool pool_;
    nb::object owner_;
    std::vector<uint32_t> slots_;
    std::unique_ptr<Digesting> digesting_;
    Place next_;
    size_t due_ = 0;
};

}  // namespace

void bind_receiver(nb::module_ &module) {
    nb::class_<BlockReceiver>(module, "BlockReceiver")
        .def(nb::init<nb::object, nb::handle>(), nb::arg("pool"), nb::arg("slots"))
        .def("receive", &BlockReceiver::receive, nb::arg("descriptor"), nb::arg("seconds"))
        .def_ro("came", &BlockReceiver::came)
        .def_prop_ro("digests", &BlockReceiver::digests);
}

}  // namespace radix
