// The border between Python and the kernels: pointers, sizes, strides and thread counts, no tensor
// type.
#pragma once

#include <cstdint>

namespace cllm {

// Element types as they cross the border; the numbers are those of cllm_kernels/_common.py.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this CPU, lowered by CLLM_KERNELS_ISA (scalar, avx2, avx512).
Isa cpu_isa();

// Whether it multiplies pairs of bf16 numbers in AVX-512 registers (VDPBF16PS); false where
// CLLM_KERNELS_ISA is set.
bool cpu_has_bf16_dot();

struct JacobiStep {
    int64_t* window;             // [rows, n], mutated
    const int64_t* predictions;  // [rows, n]
    int64_t* output;             // [rows, capacity], mutated
    int64_t* lengths;            // [rows], mutated
    int64_t* generated;          // [rows], mutated
    int64_t* progress;           // [rows], mutated
    bool* done;                  // [rows], mutated
    const int64_t* limits;       // [rows]
    const int64_t* stop_ids;     // [stops]
    const int64_t* fill;         // [rows, fill_width], or null
    int64_t* accepted;           // [rows], written
    int64_t rows;
    int64_t n;
    int64_t capacity;
    int64_t stops;
    int64_t fill_width;
    bool block_mode;  // false: sliding
    bool accept_one;  // false: all
};

// Returns -1, or the first row whose state lies outside its bounds; nothing is changed then.
int64_t jacobi_step_cpu(const JacobiStep& step, int threads);

struct GuessWindow {
    int64_t* window;           // [rows, n], mutated
    const int64_t* latest;     // [rows, vocabulary] stamp * vocabulary + token or -1, or null
    const int64_t* sequences;  // [rows, width], or null
    const int64_t* generated;  // [rows], null with sequences
    const int64_t* starts;     // [rows], null with sequences
    int64_t rows;
    int64_t n;
    int64_t vocabulary;
    int64_t width;
    int64_t longest;
    int64_t least;
    int64_t end;  // columns of sequences that are looked at
    // All three or none: how often each kind of guess was right (own, pool, text by the length of
    // the end that was found again), what each source proposed behind its kind, and where in the
    // text that was.
    int64_t* odds;      // [rows, 2 + longest, 2] right and wrong in kGuess, mutated, or null
    int64_t* proposed;  // [rows, 3, n], mutated
    int64_t* since;     // [rows], mutated
};

// A guess that was right or wrong counts as much, and both counts are halved beyond the memory: the
// same numbers as in cllm_kernels/guess_window/reference.py.
constexpr int64_t kGuess = 1024;
constexpr int64_t kGuessMemory = 32 * kGuess;

void guess_window_cpu(const GuessWindow& guess, int threads);

struct GuessCandidates {
    GuessWindow guess;  // its window is not changed
    int64_t* windows;   // [rows, count, n], written
    int64_t count;
    bool own_second;  // the window's own guesses are among the first two
};

void guess_candidates_cpu(const GuessCandidates& all, int threads);

struct BestCandidate {
    const int64_t* windows;      // [rows, count, n]
    const int64_t* predictions;  // [rows, count, n]
    const int64_t* guesses;      // [rows, count, n], or null
    int64_t* candidate;          // [rows], written
    int64_t* kept;               // [2, rows, n], or [3, rows, n] with guesses, written
    int64_t rows;
    int64_t count;
    int64_t n;
};

void best_candidate_cpu(const BestCandidate& of);

struct DraftWindow {
    int64_t* window;           // [rows, n], written
    const int64_t* checked;    // [rows, checked_width]
    const int64_t* guesses;    // [rows, n]
    const int64_t* accepted;   // [rows]
    const int64_t* generated;  // [rows]
    const int64_t* progress;   // [rows] in block mode, or null
    const int64_t* fill;       // [rows, fill_width], or null
    int64_t rows;
    int64_t n;
    int64_t checked_width;
    int64_t fill_width;
};

void draft_window_cpu(const DraftWindow& draft);

struct GuessPoolAdd {
    int64_t* latest;             // [rows, vocabulary], mutated
    int64_t* stamps;             // [rows], mutated
    const int64_t* window;       // [rows, n]
    const int64_t* predictions;  // [rows, n]
    int64_t rows;
    int64_t n;
    int64_t vocabulary;
};

void guess_pool_add_cpu(const GuessPoolAdd& add);

// Rows are addressed by two strides, so that a slice such as logits[:, -n:, :] needs no copy:
// row r begins at (r / inner) * outer_stride + (r % inner) * inner_stride, in elements.
struct Rows {
    const void* data;  // [rows / inner, inner, columns], last dimension contiguous
    Dtype dtype;
    int64_t rows;
    int64_t inner;
    int64_t outer_stride;
    int64_t inner_stride;
    int64_t columns;
};

// index [rows], value [rows] of the same type as the rows.
void row_argmax_cpu(const Rows& logits, int64_t* index, void* value, int threads);

// out [rows, width] = x / rms(x) * weight [width], rounded as HuggingFace's LlamaRMSNorm rounds;
// all of one type and contiguous.
void rms_norm_cpu(const void* x, const void* weight, Dtype dtype, int64_t rows, int64_t width,
                  float eps, void* out, int threads);

// What the noise of each row is a function of; the vocabulary index comes on top.
struct Noise {
    const int64_t* seed;      // [1]: 64 bits of key
    const int64_t* row;       // [rows], the low 32 bits count
    const int64_t* position;  // [rows]
};

// out [rows, vocabulary]: the Gumbel noise of cllm_kernels/gumbel_noise/reference.py.
void gumbel_noise_cpu(const Noise& noise, int64_t rows, int64_t vocabulary, float* out,
                      int threads);

// One chunk of the vocabulary for linear_argmax: scores [rows, columns] are the columns
// first .. first + columns - 1 of hidden @ weight.T. index [rows] and value [rows] hold the best of
// the earlier chunks (index < 0: none yet) and are updated. What is compared is
// softcap(scores + bias) * scale + noise. bias [columns] may be null; softcap 0 means none; a null
// noise.seed means no noise, else 64 must divide first.
struct ScoreChunk {
    Rows scores;
    const float* bias;  // [columns] of this chunk, or null
    float softcap;
    float scale;
    int64_t first;
    Noise noise;
};

void running_argmax_cpu(const ScoreChunk& chunk, int64_t* index, float* value, int threads);

// The same for scores that were rounded to 16 bits: every column that rounding may have put level
// with the best is computed again in fp32 from hidden [rows, width] and weight [columns, width]
// (rows of this chunk, both of the scores' type), and the best of those counts.
struct LinearOperands {
    const void* hidden;  // [rows, width]
    int64_t hidden_stride;
    const void* weight;  // [columns, width], of this chunk
    int64_t weight_stride;
    int64_t width;
};

void running_argmax_exact_cpu(const ScoreChunk& chunk, const LinearOperands& operands,
                              int64_t* index, float* value, int threads);

// out = x @ weight.T + bias for few rows, summed in fp32; a row's result does not depend on the
// others. Gated rows get (x @ a.T) @ b.T on top: those whose index modulo `period` is at least
// `gated_from`.
struct BlockLinear {
    const void* x;       // [rows, width], rows x_stride apart
    const void* weight;  // [columns, width], rows weight_stride apart; or across, see below
    const void* bias;    // [columns], or null
    void* out;           // [rows, columns], rows out_stride apart, written
    const void* a;       // [rank, width], or null
    const void* b;       // [columns, rank], or null
    Dtype dtype;         // of x, weight, bias, a and b
    Dtype out_dtype;     // the same, or fp32
    int64_t rows;
    int64_t columns;
    int64_t width;
    int64_t x_stride;
    int64_t weight_stride;
    int64_t out_stride;
    int64_t rank;
    int64_t period;
    int64_t gated_from;
    bool across = false;  // the weight is [width, columns], rows weight_stride apart, and a null
};

void block_linear_cpu(const BlockLinear& linear, int threads);

// A decoder layer of the Llama kind over the few rows of a block, behind a ragged KV cache:
// h = hidden + o(attention(norm(hidden))); out = h + down(silu(gate(norm(h))) * up(norm(h))).
// cllm_kernels/decoder_layer/reference.py has every step, and where 16-bit types are rounded.
struct LayerLinear {
    const void* weight;  // [columns, width], contiguous
    const void* bias;    // [columns], or null
    const void* a;       // [rank, width], or null
    const void* b;       // [columns, rank], or null
    int64_t rank;
};

// The linear layers, in the order of `DecoderLayer::linears`.
enum LayerPart : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLayerParts };

struct LayerCache {
    void* data;               // [batch, kv_heads, capacity, head_size], last dimension contiguous
    int64_t row, head, slot;  // strides in elements
};

struct DecoderLayer {
    const void* hidden;  // [batch * n, hidden_size], contiguous
    void* out;           // [batch * n, hidden_size], contiguous, written; may be hidden itself
    LayerLinear linears[kLayerParts];
    const void* attention_norm;  // [hidden_size]
    const void* mlp_norm;        // [hidden_size]
    const void* query_norm;      // [head_size], or null
    const void* key_norm;        // [head_size], or null
    const void* cos;             // [batch or 1, n, head_size], see rotary_row
    const void* sin;             // the same
    LayerCache keys;             // mutated
    LayerCache values;           // mutated
    const int64_t* lengths;      // [batch]
    Dtype dtype;                 // of everything else
    int64_t batch;
    int64_t n;
    int64_t hidden_size;
    int64_t mlp_size;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_size;
    int64_t capacity;
    int64_t rotary_row;    // elements from one batch row's cos to the next's; 0: one for all
    int64_t window;        // positions that a query sees, or 0: all before it
    int64_t guesses_from;  // first guess row of every batch row; n: there is none
    int64_t guess_width;   // guess rows of a chain, at least 1
    int64_t gated_from;    // first row of every batch row that gets the low-rank terms
    float scale;
    float eps;
};

// Layers one after the other, each of which reads what the one before it wrote; they differ in
// linears, norms, caches, capacity and window alone. Returns -1, or the first batch row whose block
// does not fit a cache; nothing is changed then.
int64_t decoder_layers_cpu(const DecoderLayer* layers, int64_t count, int threads);

// The in-place pass of linear_consistency_loss over one chunk of tokens: logits in, row losses and
// d(logits) out. cllm_kernels/linear_consistency_loss/reference.py has the formulas.
enum class Divergence : int { kForwardKl = 0, kReverseKl = 1, kJsd = 2 };

// kWhole does everything for whole rows. The others do the same for rows that come in pieces of the
// vocabulary, with a row's sums kept in between: all pieces for kSums, for the Jensen-Shannon
// divergence all again for kDivergence, all again for kSlopes, which also gives the losses.
enum class Stage : int { kWhole = 0, kSums = 1, kDivergence = 2, kSlopes = 3 };

// What is kept of a row between stages, as doubles.
enum StateField : int {
    kStudentMax,   // largest student logit so far
    kStudentSum,   // sum exp((s - max) / temperature)
    kTeacherMax,   // the teacher's
    kTeacherSum,   // the teacher's
    kCross,        // sum exp(..) (t - s) for forward KL, (s - t) for reverse KL
    kPlain,        // sum exp(t - max), for a cross-entropy at temperature 1
    kTotal,        // sum t
    kLabelLogit,   // t at the label
    kTeacherPart,  // KL(p || m) for the Jensen-Shannon divergence
    kStudentPart,  // KL(q || m)
    kStateFields
};

struct ConsistencyChunk {
    void* student;             // [rows, columns] logits, rows student_stride apart; see below
    void* teacher;             // [rows, columns] logits, rows teacher_stride apart; see below
    const float* row_weights;  // [rows]; a row of weight 0 has no loss and no gradient
    const int64_t* labels;     // [rows], negative: no label; or null: no labels at all
    const float* scales;       // [2], what d(student) and d(teacher) are multiplied by
    float* consistency;        // [rows], written: weight * divergence
    float* cross_entropy;      // [rows], written: 0 where there is no label
    double* state;             // [rows, kStateFields], mutated; null for kWhole
    Stage stage;
    Dtype dtype;  // of both logits
    int64_t rows;
    int64_t columns;
    int64_t student_stride;
    int64_t teacher_stride;
    int64_t first;       // the first column's index in the vocabulary
    int64_t vocabulary;  // columns of the whole row
    Divergence divergence;
    float beta;
    float inverse_temperature;
    float label_smoothing;
    float softcap;          // 0: none
    bool student_gradient;  // student becomes d(consistency)/d(student logits)
    bool teacher_gradient;  // teacher becomes d(cross-entropy)/d(teacher logits)
};

void consistency_chunk_cpu(const ConsistencyChunk& chunk, int threads);

// One side of the KV cache and the block that joins it, addressed by strides in elements.
struct CacheSide {
    const void* block;  // [batch, heads, n, width], last dimension contiguous
    void* cache;        // [batch, heads, capacity, width], last dimension contiguous
    int64_t block_row, block_head, block_token;
    int64_t cache_row, cache_head, cache_slot;
};

struct BlockAppend {
    CacheSide keys;
    CacheSide values;
    const int64_t* lengths;  // [batch]
    Dtype dtype;
    int64_t batch;
    int64_t heads;
    int64_t n;
    int64_t width;
    int64_t capacity;
};

// Copies row b's block to slots lengths[b] .. lengths[b] + n - 1 of its cache. Returns -1, or the
// first row whose block does not fit; nothing is changed then.
int64_t block_append_cpu(const BlockAppend& append, int threads);

// The slots that attention reduces over, for rows whose block stands behind `lengths`.
struct BlockView {
    const int64_t* lengths;  // [batch]
    int64_t batch;
    int64_t n;
    int64_t first;  // slots first .. first + slots - 1
    int64_t slots;
    int64_t window;  // positions that a query sees, or 0: all before it
};

// mask [batch, groups, n, slots]: 0 where token i of the block sees a slot, -inf where it does not.
void block_mask_cpu(const BlockView& view, int64_t groups, Dtype dtype, void* mask, int threads);

// Whether a slot of the view that no query of its row sees holds something that a weight of zero
// or a mask of -inf would not silence: NaN, infinity, or so large that its score could be either.
int block_unsafe_cpu(const BlockAppend& append, const BlockView& view, int threads);

#ifdef CLLM_WITH_CUDA
// Launches one kernel on the stream and returns at once: nullptr, or CUDA's name of what went
// wrong.
const char* jacobi_step_cuda(const JacobiStep& step, int device, void* stream);
const char* consistency_chunk_cuda(const ConsistencyChunk& chunk, int device, void* stream);
#endif

}  // namespace cllm
