// A routing decision's arithmetic, in three passes over the workers: what a prompt means on each (router.prediction),
// the default policy's scores (router.policies.predicted), the choice (router.choice). In NumPy these are sixty calls, a
// microsecond each whatever the number of workers. The Python modules have the same formulas, term by term; the contract
// suite compares them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "bindings.hpp"

namespace radix {
namespace {

enum Row {
    BLOCKS_TOTAL, MAX_SEQUENCES, BUDGET,
    QUEUED, QUEUED_TOKENS, QUEUED_S, HEAD_S, HEAD_SINCE, SEQUENCES, DECODING, CONTEXT,
    PENDING_BLOCKS, BLOCKS_IN_USE, LAST_ROUTED, RESIDENCE_S,
    PREFILL_STEP_S, TOKEN_S, ATTENTION_S, DECODE_STEP_S, SEQUENCE_S, CONTEXT_S, FETCH_TOKEN_S,
    COLUMNS,  // of the table; what follows is predicted
    CACHED_TOKENS = COLUMNS, FETCHED_TOKENS, PREFILL_TOKENS, USED_BLOCKS, FREE_BLOCKS, WAITING, QUEUE_S, MEMORY_S,
    FETCH_S, TOKENS_S, PREFILL_S, DECODE_S, TTFT_S,
    ROWS,
};

// A C-contiguous array of doubles with so many rows.
class Doubles {
  public:
    Doubles(nb::handle value, const char *field, npy_intp rows) {
        auto *array = reinterpret_cast<PyArrayObject *>(value.ptr());
        if (!PyArray_Check(value.ptr()) || PyArray_TYPE(array) != NPY_FLOAT64 || PyArray_NDIM(array) != 2 ||
            PyArray_DIM(array, 0) != rows || !PyArray_ISCARRAY_RO(array))
            throw nb::type_error((std::string(field) + ": a C-contiguous array of float64 with " +
                                  std::to_string(rows) + " rows is needed").c_str());
        data_ = static_cast<const double *>(PyArray_DATA(array));
        slots = PyArray_DIM(array, 1);
    }
    const double *row(int number) const { return data_ + number * slots; }

    npy_intp slots;

  private:
    const double *data_;
};

class Slots {
  public:
    Slots(nb::handle value, npy_intp count) {
        auto *array = reinterpret_cast<PyArrayObject *>(value.ptr());
        if (!PyArray_Check(value.ptr()) || PyArray_TYPE(array) != NPY_INTP || PyArray_NDIM(array) != 1 ||
            !PyArray_ISCARRAY_RO(array))
            throw nb::type_error("slots: a contiguous one-dimensional array of intp is needed");
        data = static_cast<const npy_intp *>(PyArray_DATA(array));
        size = PyArray_DIM(array, 0);
        for (npy_intp i = 0; i < size; i++)
            if (data[i] < 0 || data[i] >= count)
                throw nb::value_error(
                    ("slot is " + std::to_string(data[i]) + ": there are " + std::to_string(count)).c_str());
    }
    const npy_intp *data;
    npy_intp size;
};

// Seconds that the decoding sequences add to a step.
template <class At> double beside_s(At at) { return at(SEQUENCE_S) * at(DECODING) + at(CONTEXT_S) * at(CONTEXT); }

template <class At> double queue_s(At at, double now, double head_left) {
    const double step_s = at(PREFILL_STEP_S) + beside_s(at);
    const double all_s = at(QUEUED_S) + step_s * std::ceil(at(QUEUED_TOKENS) / at(BUDGET));
    return std::max(all_s - std::min(now - at(HEAD_SINCE), (1 - head_left) * at(HEAD_S)), 0.0);
}

struct Prompt {
    double tokens, blocks, reusable_blocks, block_size;
};

// What is the same for all workers.
struct Setting {
    double now, head_left, host_share, fetch_start_s;
    double longest;  // leading blocks of the prompt that the source with most of them holds
};

struct Computing {
    double tokens, tokens_s, prefill_s;
};

// The predicted rows of one worker, whose columns are in place.
template <class At> void predict_one(At at, const Prompt &prompt, double device, double held, const Setting &setting) {
    const double now = setting.now;
    device = std::min(device, prompt.reusable_blocks);
    held = std::min(held, prompt.reusable_blocks);
    const double used = at(USED_BLOCKS) = at(BLOCKS_IN_USE) + at(PENDING_BLOCKS);
    at(FREE_BLOCKS) = std::max(at(BLOCKS_TOTAL) - used, 0.0);

    const double beside = beside_s(at);
    const double decode_s = at(DECODE_STEP_S) + beside;
    at(WAITING) = at(QUEUED) - (now - at(HEAD_SINCE) > decode_s && at(QUEUED) > 0);
    at(QUEUE_S) = queue_s(at, now, setting.head_left);
    const auto computing = [&](double cached) {
        const double tokens = prompt.tokens - cached;
        const double tokens_s = tokens * (at(TOKEN_S) + at(ATTENTION_S) * (cached + tokens / 2));
        const double steps_s = (at(PREFILL_STEP_S) + beside) * std::ceil(tokens / at(BUDGET));
        const double host_s = (held - device) * prompt.block_size * setting.host_share * at(TOKEN_S);
        return Computing{tokens, tokens_s, tokens_s + steps_s + host_s};
    };
    Computing best = computing(held * prompt.block_size);
    at(FETCHED_TOKENS) = at(FETCH_S) = 0;
    if (const double missing = (setting.longest - held) * prompt.block_size; at(FETCH_TOKEN_S) > 0 && missing > 0) {
        const Computing fetched = computing(setting.longest * prompt.block_size);
        const double fetch_s = setting.fetch_start_s + missing * at(FETCH_TOKEN_S);
        if (fetched.prefill_s + fetch_s < best.prefill_s) {
            best = fetched;
            at(FETCHED_TOKENS) = missing;
            at(FETCH_S) = fetch_s;
        }
    }
    at(CACHED_TOKENS) = held * prompt.block_size + at(FETCHED_TOKENS);
    at(PREFILL_TOKENS) = best.tokens;
    at(TOKENS_S) = best.tokens_s;
    at(PREFILL_S) = best.prefill_s;
    at(DECODE_S) = at(QUEUED_TOKENS) == 0 && at(DECODING) > 0 ? decode_s / 2 : 0;
    const double lacking = prompt.blocks - device - at(FREE_BLOCKS);
    at(MEMORY_S) = lacking > 0 ? lacking * (at(RESIDENCE_S) / std::max(used, 1.0)) : 0;
    at(TTFT_S) = std::max({at(QUEUE_S), at(MEMORY_S), at(FETCH_S)}) + at(PREFILL_S) + at(DECODE_S);
}

nb::object predict(nb::handle values, nb::handle slots, nb::handle held_blocks, int64_t prompt_tokens,
                   int64_t block_size, double now, double head_left, double host_share, double fetch_start_s,
                   nb::handle sources) {
    const Doubles table(values, "values", COLUMNS), held(held_blocks, "held_blocks", 2);
    const npy_intp count = std::min(table.slots, held.slots);
    const Slots chosen(slots, count), holders(sources.is_none() ? slots : sources, count);
    check_range("prompt_tokens", prompt_tokens, 1, INT64_MAX);
    check_range("block_size", block_size, 1, INT64_MAX);
    const Prompt prompt{double(prompt_tokens), double((prompt_tokens - 1) / block_size + 1),
                        double((prompt_tokens - 1) / block_size), double(block_size)};
    Setting setting{now, head_left, host_share, fetch_start_s, 0};
    for (npy_intp i = 0; i < holders.size; i++)
        setting.longest = std::max(setting.longest, std::min(held.row(1)[holders.data[i]], prompt.reusable_blocks));
    double *out;
    nb::object rows = new_array({ROWS, chosen.size}, NPY_FLOAT64, &out);
    for (int column = 0; column < COLUMNS; column++)
        for (npy_intp i = 0; i < chosen.size; i++) out[column * chosen.size + i] = table.row(column)[chosen.data[i]];
    for (npy_intp i = 0; i < chosen.size; i++) {
        const auto at = [=](Row row) -> double & { return out[row * chosen.size + i]; };
        const npy_intp slot = chosen.data[i];
        predict_one(at, prompt, held.row(0)[slot], held.row(1)[slot], setting);
    }
    return rows;
}

// Scores of one policy or another for the rows of a prediction: a contiguous array.
const double *scores_of(nb::handle value, npy_intp size) {
    auto *array = reinterpret_cast<PyArrayObject *>(value.ptr());
    if (!PyArray_Check(value.ptr()) || PyArray_TYPE(array) != NPY_FLOAT64 || PyArray_NDIM(array) != 1 ||
        PyArray_DIM(array, 0) != size || !PyArray_ISCARRAY_RO(array))
        throw nb::type_error("scores: a contiguous one-dimensional array of float64, one for each worker, is needed");
    return static_cast<const double *>(PyArray_DATA(array));
}

nb::object predicted_ttft_scores(nb::handle rows, double full_weight, double even_full, double most_pushed_s) {
    const Doubles table(rows, "rows", ROWS);
    const auto at = [&](Row row, npy_intp i) { return table.row(row)[i]; };
    const auto full = [&](npy_intp i) { return at(USED_BLOCKS, i) / at(BLOCKS_TOTAL, i); };
    double least_full = std::numeric_limits<double>::infinity();
    for (npy_intp i = 0; i < table.slots; i++) least_full = std::min(least_full, full(i));
    double *out;
    nb::object scores = new_array({table.slots}, NPY_FLOAT64, &out);
    for (npy_intp i = 0; i < table.slots; i++) {
        const double prefill_s = at(PREFILL_S, i);
        const double joined_s = at(WAITING, i) * std::min(prefill_s, at(BUDGET, i) * at(TOKEN_S, i));
        const double pushed_out = full_weight * (full(i) - even_full * least_full);
        out[i] = at(TTFT_S, i) + joined_s + pushed_out * std::min(prefill_s, most_pushed_s);
    }
    return scores;
}

// (scores, chosen row, whether others tied), or None where nobody has room.
nb::object choose(nb::handle rows, nb::object scores, nb::callable tie) {
    const Doubles table(rows, "rows", ROWS);
    const double *score = scores_of(scores, table.slots);
    const auto at = [&](Row row, npy_intp i) { return table.row(row)[i]; };
    const auto is_full = [&](npy_intp i) { return at(SEQUENCES, i) >= at(MAX_SEQUENCES, i); };
    double least = std::numeric_limits<double>::infinity();
    npy_intp full = 0;
    for (npy_intp i = 0; i < table.slots; i++) {
        if (is_full(i)) full++;
        else least = std::min(least, score[i]);
    }
    if (full == table.slots) return nb::none();
    const double bound = nb::cast<double>(tie(least));
    npy_intp chosen = -1, tied = 0;
    const auto rank = [&](npy_intp i) {
        return std::tuple(-at(FREE_BLOCKS, i), at(SEQUENCES, i), at(LAST_ROUTED, i));
    };
    for (npy_intp i = 0; i < table.slots; i++) {
        if (is_full(i) || !(score[i] <= bound)) continue;
        if (!tied++ || rank(i) < rank(chosen)) chosen = i;
    }
    if (!tied) throw nb::value_error("no worker's score is within the tie of the least one");
    if (full) {
        double *out;
        nb::object masked = new_array({table.slots}, NPY_FLOAT64, &out);
        for (npy_intp i = 0; i < table.slots; i++)
            out[i] = is_full(i) ? std::numeric_limits<double>::infinity() : score[i];
        scores = masked;
    }
    return nb::make_tuple(scores, chosen, tied > 1);
}

nb::object queues_s(nb::handle values, nb::handle slots, double now, double head_left) {
    const Doubles table(values, "values", COLUMNS);
    const Slots chosen(slots, table.slots);
    double *out;
    nb::object queues = new_array({chosen.size}, NPY_FLOAT64, &out);
    for (npy_intp i = 0; i < chosen.size; i++) {
        const npy_intp slot = chosen.data[i];
        out[i] = queue_s([&](Row row) { return table.row(row)[slot]; }, now, head_left);
    }
    return queues;
}

}  // namespace

void bind_prediction(nb::module_ &module) {
    module.def("predict", &predict, nb::arg("values"), nb::arg("slots"), nb::arg("held_blocks"),
               nb::arg("prompt_tokens"), nb::arg("block_size"), nb::arg("now"), nb::arg("head_left"),
               nb::arg("host_share"), nb::arg("fetch_start_s"), nb::arg("sources") = nb::none(),
               "See router.prediction.predict.");
    module.def("predicted_ttft_scores", &predicted_ttft_scores, nb::arg("rows"), nb::arg("full_weight"),
               nb::arg("even_full"), nb::arg("most_pushed_s"), "See router.policies.predicted.");
    module.def("choose", &choose, nb::arg("rows"), nb::arg("scores"), nb::arg("tie"), "See router.choice.choose.");
    module.def("queues_s", &queues_s, nb::arg("values"), nb::arg("slots"), nb::arg("now"), nb::arg("head_left"),
               "See router.prediction.queues_s.");
}

}  // namespace radix
