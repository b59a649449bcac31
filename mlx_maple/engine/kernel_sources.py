"""The text of our kernels, for CUDA and Metal alike: what kernels.py compiles, checks and calls.

Each function or constant is one kernel's body. ``$name`` in it is a word of the dialect; names in
capitals are told when it is compiled, all others at run time, so that one compilation serves all
sizes.

Legend   B batch; N pixels; C channels, of which C1 of a map's own and C2 of a skip; G groups; V
         numbers that one access takes; R pixels that a block takes at once; L rows of tokens; F
         width of a gate; S keys.
Source   Wu and He 2018, Group Normalization (arXiv:1803.08494); Chan et al. 1979 for shifted sums;
         Shazeer 2020, GLU variants (arXiv:2002.05202); Dao 2023, FlashAttention-2
         (arXiv:2307.08691).
"""

from dataclasses import dataclass

# The dialects ------------------------------------------------------------------------------------


# One pixel's numbers added to a group's sum and squares, both from ``origin``.
MOMENTS = """$unroll
        for (int i = 0; i < V; ++i) {
          const float d = float(v[k].at[i]) + owed.at[i] - origin;
          sum += d;
          squares += d * d;
        }"""


@dataclass(frozen=True)
class Dialect:
    """What differs between two languages.

    Attributes:
        words: for ``$name`` in the sources.
        header: functions that the sources call.
        threads: of a block that owns a group; more would have to share its registers.
    """

    words: dict[str, str]
    header: str
    threads: int


CUDA = Dialect(
    {
        "thread": "int(threadIdx.x)",
        "block": "int(blockIdx.x)",
        "block_y": "int(blockIdx.y)",
        "shared": "__shared__",
        "barrier": "__syncthreads();",
        "rsqrt": "rsqrtf",
        "device": "",
        "unroll": '_Pragma("unroll")',
        "rolled": '_Pragma("unroll 1")',
    },
    """
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };
template <int N, typename T> __device__ inline Pack<T, N> fetch(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, typename T> __device__ inline void put(T* p, const Pack<T, N>& v) {
  *reinterpret_cast<Pack<T, N>*>(p) = v;
}
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ inline float above_zero(float x) { return x > 0.0f ? x : 0.0f; }
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
""",
    512,
)
METAL = Dialect(
    {
        "thread": "int(thread_position_in_threadgroup.x)",
        "block": "int(threadgroup_position_in_grid.x)",
        "block_y": "int(threadgroup_position_in_grid.y)",
        "shared": "threadgroup",
        "barrier": "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "rsqrt": "metal::precise::rsqrt",
        "device": "device",
        "unroll": '_Pragma("unroll")',
        "rolled": '_Pragma("unroll 1")',
    },
    """
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };
template <int N, typename T> inline Pack<T, N> fetch(const device T* p) {
  return *reinterpret_cast<const device Pack<T, N>*>(p);
}
template <int N, typename T> inline void put(device T* p, Pack<T, N> v) {
  *reinterpret_cast<device Pack<T, N>*>(p) = v;
}
inline float warp_sum(float x) { return simd_sum(x); }
inline float above_zero(float x) { return x > 0.0f ? x : 0.0f; }
inline float silu(float x) { return x / (1.0f + metal::exp(-x)); }
""",
    512,
)


# Sources -----------------------------------------------------------------------------------------

# Beside arrays a kernel is told numbers by name, at run time: one compilation serves all sizes.
_CHANNELS = """
  const int C = C1 + C2, CPG = C / G;
"""


@dataclass(frozen=True)
class Form:
    """Which terms a feature map's sum has, what becomes of it, and whether registers hold it."""

    residual: bool = False
    skip: bool = False
    shift: bool = False
    silu: bool = False
    unfold: bool = False
    held: bool = False

    @property
    def inputs(self) -> list[str]:
        """Names of the terms."""
        return ["value", *(n for n in ("residual", "skip", "shift") if getattr(self, n))]

    @property
    def suffix(self) -> str:
        """What tells this form's kernels from others'."""
        parts = ("residual", "skip", "shift", "silu", "unfold", "held")
        return "".join(f"_{n}" for n in parts if getattr(self, n))

    def aim(self, c: str) -> str:
        """Text that points ``from`` at sample b, channels c to c + V of a map that holds them.

        And ``sum_to`` at their place in the sum that is written down, whose pixels are C apart.

        A thread keeps its channels while it walks over pixels ``step`` numbers apart, and so keeps
        ``owed``, what is owed there, in registers.
        """
        text = f"const $device T* from = value + b * N * C1 + {c};\n    int step = C1;"
        if self.skip:
            text = f"""const bool is_own = {c} < C1;
    const $device T* from = is_own ? value + b * N * C1 + {c} : skip + b * N * C2 + {c} - C1;
    const int step = is_own ? C1 : C2;"""
        if self.residual:
            text += f"\n    const $device T* other = residual + b * N * C1 + {c};"
        if self.is_kept:
            text += f"\n    $device T* sum_to = total + b * N * C + {c};"
        text += "\n    Pack<float, V> owed = {};"
        if self.shift:  # whose beginning need not be aligned for a wider access
            text += f"""
    for (int i = 0; i < V; ++i) owed.at[i] = shift[b * row_stride + row_start + {c} + i];"""
        return text

    @property
    def is_kept(self) -> bool:
        """Whether the sum is written down: where it is not one of the terms."""
        return self.residual or self.skip

    @property
    def is_summed(self) -> str:
        """An expression: whether a residual is added to these channels."""
        return "false" if not self.residual else "is_own" if self.skip else "true"

    def origin(self, c: str) -> str:
        """An expression: the sum at pixel 0, channel c, of sample b, as it is written down."""
        own = f"float(value[b * N * C1 + {c}])"
        if self.residual:
            own = f"float(T({own} + float(residual[b * N * C1 + {c}])))"
        if self.skip:
            own = f"({c} < C1 ? {own} : float(skip[b * N * C2 + {c} - C1]))"
        return own + (f" + shift[b * row_stride + row_start + {c}]" if self.shift else "")

    def add_up(self, begin: str, end: str) -> str:
        """Text for the first pass over pixels: ``sum`` and ``squares`` about ``origin``.

        Loads go ahead of the arithmetic, some pixels at once: nothing here tells the compiler that
        what is stored is never loaded.
        """
        added = ""
        if self.residual:
            added = f"""
      if ({self.is_summed}) {{
        Pack<T, V> w[AHEAD];
        $unroll
        for (int k = 0; k < AHEAD; ++k)
          if (n + k * R < {end}) w[k] = fetch<V>(other + (n + k * R) * step);
        $unroll
        for (int k = 0; k < AHEAD; ++k) if (n + k * R < {end}) {{
          $unroll
          for (int i = 0; i < V; ++i) v[k].at[i] = T(float(v[k].at[i]) + float(w[k].at[i]));
        }}
      }}"""
        kept = "put<V>(sum_to + (n + k * R) * C, v[k]);" if self.is_kept else ""
        return f"""
    $rolled
    for (int n = {begin}; n < {end}; n += R * AHEAD) {{
      Pack<T, V> v[AHEAD];
      $unroll
      for (int k = 0; k < AHEAD; ++k)
        if (n + k * R < {end}) v[k] = fetch<V>(from + (n + k * R) * step);{added}
      $unroll
      for (int k = 0; k < AHEAD; ++k) if (n + k * R < {end}) {{
        {kept}
        {MOMENTS}
      }}
    }}"""

    def hold(self, begin: str, end: str) -> str:
        """As ``add_up``, of HELD pixels at the most, which stay in ``v``."""
        added = ""
        if self.residual:
            added = f"""
    $unroll
    for (int near = 0; near < HELD; near += AHEAD) if ({self.is_summed}) {{
      Pack<T, V> w[AHEAD];
      $unroll
      for (int k = near; k < near + AHEAD && k < HELD; ++k)
        if ({begin} + k * R < {end}) w[k - near] = fetch<V>(other + ({begin} + k * R) * step);
      $unroll
      for (int k = near; k < near + AHEAD && k < HELD; ++k) if ({begin} + k * R < {end}) {{
        $unroll
        for (int i = 0; i < V; ++i)
          v[k].at[i] = T(float(v[k].at[i]) + float(w[k - near].at[i]));
      }}
    }}"""
        kept = f"put<V>(sum_to + ({begin} + k * R) * C, v[k]);" if self.is_kept else ""
        return f"""
    Pack<T, V> v[HELD];
    $unroll
    for (int k = 0; k < HELD; ++k)
      if ({begin} + k * R < {end}) v[k] = fetch<V>(from + ({begin} + k * R) * step);{added}
    $unroll
    for (int k = 0; k < HELD; ++k) if ({begin} + k * R < {end}) {{
      {kept}
      {MOMENTS}
    }}"""

    def normalise(self, begin: str, end: str, c: str) -> str:
        """Text for the second pass over pixels, which writes ``y_out``."""
        if self.held:
            return f"""{self._constants(c)}
    $unroll
    for (int k = 0; k < HELD; ++k) if ({begin} + k * R < {end}) {{
      const int m = {begin} + k * R;{self._written(c)}
    }}"""
        source, apart = ("sum_to", "C") if self.is_kept else ("from", "step")
        return f"""{self._constants(c)}
    $rolled
    for (int n = {begin}; n < {end}; n += R * AHEAD) {{
      Pack<T, V> v[AHEAD];
      $unroll
      for (int k = 0; k < AHEAD; ++k)
        if (n + k * R < {end}) v[k] = fetch<V>({source} + (n + k * R) * {apart});
      $unroll
      for (int k = 0; k < AHEAD; ++k) if (n + k * R < {end}) {{
        const int m = n + k * R;{self._written(c)}
      }}
    }}"""

    def _constants(self, c: str) -> str:
        """Text for what a thread multiplies by and adds."""
        none = ""
        if self.unfold:
            none = "Pack<T, V> none;\n    for (int i = 0; i < V; ++i) none.at[i] = T(0.0f);"
        return f"""{none}
    const Pack<float, V> gain = fetch<V>(weight + {c});
    const Pack<float, V> offsets = fetch<V>(bias + {c});
    float a[V], z[V];
    $unroll
    for (int i = 0; i < V; ++i) {{
      a[i] = rstd * gain.at[i];
      z[i] = (owed.at[i] - mean) * a[i] + offsets.at[i];
    }}"""

    def _written(self, c: str) -> str:
        """Text that writes what becomes of ``v[k]``, the sum at pixel m."""
        gate = "y = silu(y);" if self.silu else ""
        if self.unfold:
            store = f"""
        const int row = m / columns, column = m - row * columns;
        $rolled
        for (int near = 0; near < 9; ++near) {{
          const int dy = near / 3 - 1, dx = near % 3 - 1;
          // This pixel is that neighbour of the one at (row - dy, column - dx).
          const int i = row - dy, j = column - dx;
          if (i >= 0 && i < rows && j >= 0 && j < columns)
            put<V>(y_out + ((b * N + i * columns + j) * 9 + near) * C + {c}, out);
          const int u = row + dy, w = column + dx;
          if (u < 0 || u >= rows || w < 0 || w >= columns)
            put<V>(y_out + ((b * N + m) * 9 + near) * C + {c}, none);
        }}"""
        else:
            store = f"put<V>(y_out + (b * N + m) * C + {c}, out);"
        return f"""
        Pack<T, V> out;
        $unroll
        for (int i = 0; i < V; ++i) {{
          float y = float(v[k].at[i]) * a[i] + z[i];
          {gate}
          out.at[i] = T(y);
        }}
        {store}"""


def one_block_norm(form: Form) -> str:
    """A block owns a group of a sample: sums about the group's first number, then the second pass.

    Sums of squares about a number of the group itself lose no digits to a large mean.
    """
    return f"""{_CHANNELS}
  const int b = $block / G, g = $block % G, tid = $thread;
  const int P = CPG / V, R = THREADS / P;
  const int c = g * CPG + (tid % P) * V, r = tid / P;
  $shared float sums[64];
  {form.aim("c")}
  const int first = g * CPG;
  const float origin = {form.origin("first")};
  float sum = 0.0f, squares = 0.0f;
  if (r < R) {{{form.add_up("r", "N")}
  }}
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  const int lane = tid % 32;
  if (lane == 0) {{ sums[tid / 32] = sum; sums[32 + tid / 32] = squares; }}
  $barrier
  sum = warp_sum(lane < THREADS / 32 ? sums[lane] : 0.0f);
  squares = warp_sum(lane < THREADS / 32 ? sums[32 + lane] : 0.0f);
  const float count = float(N) * float(CPG);
  const float offset = sum / count;
  const float mean = origin + offset;
  const float rstd = $rsqrt(above_zero(squares / count - offset * offset) + eps);
  if (r < R) {{{form.normalise("r", "N", "c")}
  }}
"""


def slab_sums(form: Form) -> str:
    """Sums of one slab of pixels, about each group's first number: (B, slabs, G, 2)."""
    return f"""{_CHANNELS}
  const int slab = $block, b = $block_y, tid = $thread;
  const int Q = C / V, P = CPG / V;
  const int R = Q < THREADS ? THREADS / Q : 1;
  const int each = (N + SLABS - 1) / SLABS;
  const int begin = slab * each, end = begin + each < N ? begin + each : N;
  $shared float held[2 * THREADS];
  float group_sum = 0.0f, group_squares = 0.0f;
  $rolled
  for (int base = 0; base < Q; base += THREADS) {{
    const int width = Q - base < THREADS ? Q - base : THREADS;
    const int q = base + tid % width, r = tid / width;
    float sum = 0.0f, squares = 0.0f;
    if (r < R) {{
      const int c = q * V, first = q / P * CPG;
      {form.aim("c")}
      const float origin = {form.origin("first")};
      {form.add_up("begin + r", "end")}
    }}
    held[tid] = sum;
    held[THREADS + tid] = squares;
    $barrier
    const int low = tid * P > base ? tid * P : base;
    const int high = (tid + 1) * P < base + width ? (tid + 1) * P : base + width;
    if (tid < G) $rolled for (int k = 0; k < R; ++k) $rolled for (int e = low; e < high; ++e) {{
      group_sum += held[k * width + e - base];
      group_squares += held[THREADS + k * width + e - base];
    }}
    $barrier
  }}
  if (tid < G) {{
    partial[((b * SLABS + slab) * G + tid) * 2] = group_sum;
    partial[((b * SLABS + slab) * G + tid) * 2 + 1] = group_squares;
  }}
"""


def slab_norm(form: Form) -> str:
    """The second pass over large maps: every block knows all groups, and takes some pixels."""
    return f"""{_CHANNELS}
  const int b = $block_y, tid = $thread;
  const int Q = C / V, P = CPG / V;
  const int R = Q < THREADS ? THREADS / Q : 1;
  const int begin = $block * each, end = begin + each < N ? begin + each : N;
  $shared float means[THREADS];
  $shared float rstds[THREADS];
  const int parts = THREADS / G, group = tid % G;
  float sum = 0.0f, squares = 0.0f;
  $rolled
  for (int k = tid / G; k < SLABS && tid < parts * G; k += parts) {{
    sum += partial[((b * SLABS + k) * G + group) * 2];
    squares += partial[((b * SLABS + k) * G + group) * 2 + 1];
  }}
  means[tid] = sum;
  rstds[tid] = squares;
  $barrier
  if (tid < G) {{
    for (int k = 1; k < parts; ++k) {{
      sum += means[k * G + tid];
      squares += rstds[k * G + tid];
    }}
    const int first = tid * CPG;
    const float count = float(N) * float(CPG);
    const float offset = sum / count;
    means[tid] = offset + {form.origin("first")};
    rstds[tid] = $rsqrt(above_zero(squares / count - offset * offset) + eps);
  }}
  $barrier
  $rolled
  for (int base = 0; base < Q; base += THREADS) {{
    const int width = Q - base < THREADS ? Q - base : THREADS;
    const int q = base + tid % width, r = tid / width;
    if (r < R) {{
      const int c = q * V;
      const float mean = means[q / P], rstd = rstds[q / P];
      {form.aim("c")}
      {form.normalise("begin + r", "end", "c")}
    }}
  }}
"""


def cluster_norm(form: Form) -> str:
    """A cluster of blocks owns some groups of a sample, each block a part of the pixels.

    Several groups side by side are as many channels as memory is read at once; a block alone would
    take too long over them. The blocks tell each other their sums. Where HELD pixels a thread are
    all, they stay in its registers: the second pass reads nothing.
    """
    taken = form.hold if form.held else form.add_up
    return f"""{_CHANNELS}
  const int rank = $block % CLUSTER, chunks = G / GROUPS, tid = $thread;
  const int chunk = $block / CLUSTER % chunks, b = $block / CLUSTER / chunks;
  const int Q = CPG / V, P = GROUPS * Q, R = THREADS / P;
  const int group = tid % P / Q, r = tid / P;
  const int first = (chunk * GROUPS + group) * CPG, c = first + tid % Q * V;
  const int each = (N + CLUSTER - 1) / CLUSTER;
  const int begin = rank * each, end = r >= R ? 0 : begin + each < N ? begin + each : N;
  $shared float held[2 * THREADS];
  $shared float sums[2 * GROUPS];
  $shared float totals[2 * GROUPS];
  {form.aim("c")}
  const float origin = {form.origin("first")};
  float sum = 0.0f, squares = 0.0f;
  {taken("begin + r", "end")}
  held[tid] = sum;
  held[THREADS + tid] = squares;
  $barrier
  const int lane = tid % 32;
  for (int k = tid / 32; k < 2 * GROUPS; k += THREADS / 32) {{
    const float* from = held + k % 2 * THREADS + k / 2 * Q;
    float x = 0.0f;
    for (int t = lane; t < R; t += 32) for (int i = 0; i < Q; ++i) x += from[t * P + i];
    x = warp_sum(x);
    if (lane == 0) sums[k] = x;
  }}
  cluster_arrive();
  cluster_wait();
  if (tid < 2 * GROUPS) {{
    float x = 0.0f;
    for (int k = 0; k < CLUSTER; ++k) x += of_block(sums + tid, k);
    totals[tid] = x;
  }}
  $barrier
  cluster_arrive();
  const float count = float(N) * float(CPG);
  const float offset = totals[2 * group] / count;
  const float mean = origin + offset;
  const float rstd = $rsqrt(above_zero(totals[2 * group + 1] / count - offset * offset) + eps);
  {form.normalise("begin + r", "end", "c")}
  cluster_wait();  // no block goes before the others have read its sums
"""


CLUSTER_HEADER = """
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline float of_block(const float* at, int block) {
  uint32_t there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there) : "r"(uint32_t(__cvta_generic_to_shared(at))), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}
"""


# A warp a row, which stays in registers; sums are taken about the row's first number.
LAYER_NORM = """
  const int lane = $thread % 32;
  const int row = $block * ROWS + $thread / 32;
  if (row < L) {
    constexpr int EACH = (C / V + 31) / 32;
    const float origin = float(value[row * C]) + shift[0];
    float x[EACH * V];
    float sum = 0.0f, squares = 0.0f;
    $unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = (k * 32 + lane) * V;
      if (c < C) {
        const Pack<T, V> v = fetch<V>(value + row * C + c);
        const Pack<float, V> owed = fetch<V>(shift + c);
        $unroll
        for (int i = 0; i < V; ++i) {
          const float d = float(v.at[i]) + owed.at[i] - origin;
          x[k * V + i] = d;
          sum += d;
          squares += d * d;
        }
      }
    }
    const float mean = warp_sum(sum) / float(C);
    const float rstd = $rsqrt(above_zero(warp_sum(squares) / float(C) - mean * mean) + eps);
    $unroll
    for (int k = 0; k < EACH; ++k) {
      const int c = (k * 32 + lane) * V;
      if (c < C) {
        const Pack<float, V> gain = fetch<V>(weight + c), offset = fetch<V>(bias + c);
        Pack<T, V> out;
        $unroll
        for (int i = 0; i < V; ++i)
          out.at[i] = T((x[k * V + i] - mean) * rstd * gain.at[i] + offset.at[i]);
        put<V>(y_out + row * C + c, out);
      }
    }
  }
"""


def gate(has_beside: bool) -> str:
    """GEGLU of rows (2 F,): to (F,), or to (W,) with other numbers beside."""
    gated = """
    const Pack<T, V> v = fetch<V>(value + row * 2 * F + f);
    const Pack<T, V> g = fetch<V>(value + row * 2 * F + F + f);
    const Pack<float, V> p = fetch<V>(bias + f), q = fetch<V>(bias + F + f);
    $unroll
    for (int i = 0; i < V; ++i)
      out.at[i] = T((float(v.at[i]) + p.at[i]) * gelu(float(g.at[i]) + q.at[i]));"""
    if has_beside:
        gated = f"""
    if (f >= F) out = fetch<V>(beside + row * (W - F) + f - F);
    else {{{gated}
    }}"""
    return f"""
  const int at = ($block * THREADS + $thread) * V;
  if (at < L * W) {{
    const int row = at / W, f = at - row * W;
    Pack<T, V> out;{gated}
    put<V>(y_out + at, out);
  }}
"""


def total(residual: bool) -> str:
    """A map added up and, with a factor of 2, doubled."""
    added = ""
    if residual:
        added = """
    const Pack<T, V> w = fetch<V>(residual + from);
    for (int i = 0; i < V; ++i) x[i] += float(w.at[i]);"""
    return f"""
  const int Q = C / V, at = $block * THREADS + $thread;
  if (at < B * out_rows * out_columns * Q) {{
    const int pixel = at / Q, c = (at - pixel * Q) * V;
    const int b = pixel / (out_rows * out_columns);
    const int inside = pixel - b * out_rows * out_columns;
    const int row = inside / out_columns, column = inside - row * out_columns;
    const int from = ((b * rows + row / factor) * columns + column / factor) * C + c;
    const Pack<T, V> v = fetch<V>(value + from);
    const Pack<float, V> owed = fetch<V>(shift + c);
    float x[V];
    for (int i = 0; i < V; ++i) x[i] = float(v.at[i]) + owed.at[i];{added}
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) out.at[i] = T(x[i]);
    put<V>(y_out + pixel * C + c, out);
  }}
"""


# A map twice as large out of its four phases: those of the even and odd rows and columns.
INTERLEAVE = """
  const int Q = C / V, at = $block * THREADS + $thread;
  if (at < B * 4 * rows * columns * Q) {
    const int pixel = at / Q, c = (at - pixel * Q) * V;
    const int b = pixel / (4 * rows * columns), inside = pixel - b * 4 * rows * columns;
    const int row = inside / (2 * columns), column = inside - row * 2 * columns;
    const int below = row & 1, right = column & 1;
    const int y = row / 2 + below, x = column / 2 + right;
    const int from = (b * (rows + 1) + y) * (columns + 1) + x;
    put<V>(y_out + pixel * C + c, fetch<V>(phases + (from * 4 + 2 * below + right) * C + c));
  }
"""

# FlashAttention-2 (Dao 2023, arXiv:2307.08691) on tensor cores, for what MLX has no fused kernel on
# CUDA: heads wider than 128; and for few keys, where cuDNN's call costs more than its work. Four
# warps share some keys and values at a time, which come while they work on others; each owns 16
# queries, whose scores and sums never leave its registers. Accumulators of the first product are,
# in pairs, operands of the second.
ATTENTION = """
  constexpr int DP = (D + 15) / 16 * 16, STRIDE = DP + 8;
  __shared__ __align__(16) T held[2 * KEYS * STRIDE];
  T *keys = held, *values = held + KEYS * STRIDE;
  const int b = $block_y / H, h = $block_y % H;
  const int tid = $thread, warp = tid / 32, lane = tid % 32, quad = lane / 4, pair = lane % 4 * 2;
  const T* q_from = queries + b * TQ * q_row + h * D;
  const T* k_from = others + b * S * kv_row + kv_row - (2 * H - h) * D;
  const T* v_from = k_from + H * D;
  const int first = ($block * WARPS + warp) * 16, row0 = first + quad, row1 = row0 + 8;
  bring<KEYS, D, STRIDE, WARPS>(keys, k_from, kv_row, S, tid);
  bring<KEYS, D, STRIDE, WARPS>(values, v_from, kv_row, S, tid);

  const T *q0 = q_from + row0 * q_row + pair, *q1 = q0 + 8 * q_row;
  uint32_t q[DP / 16][4];
#pragma unroll
  for (int t = 0; t < DP / 16; ++t)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int d = t * 16 + j / 2 * 8;
      q[t][j] = (j % 2 ? row1 : row0) < TQ && d < D ? two_at((j % 2 ? q1 : q0) + d) : 0u;
    }
  float o[DP / 8][4] = {};
  float top0 = -INFINITY, top1 = -INFINITY, sum0 = 0.0f, sum1 = 0.0f;
  const float factor = scale * 1.4426950408889634f;

#pragma unroll 1
  for (int start = 0; start < S; start += KEYS) {
    const int next = start + KEYS;
    all_but_one_came();  // the values may be on their way
    __syncthreads();
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int t = 0; t < DP / 16; ++t)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
        uint32_t k[4];
        const T* at = keys + (n * 8 + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
        four_blocks(k, at + t * 16);
        multiply(s[n], q[t], k[0], k[1], T());
        multiply(s[n + 1], q[t], k[2], k[3], T());
      }
    __syncthreads();
    bring<KEYS, D, STRIDE, WARPS>(keys, k_from + next * kv_row, kv_row, S - next, tid);
    if (next > S)
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (start + n * 8 + pair + j % 2 >= S) s[n][j] = -INFINITY;
    float new0 = top0, new1 = top1;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      new0 = fmaxf(new0, fmaxf(s[n][0], s[n][1]));
      new1 = fmaxf(new1, fmaxf(s[n][2], s[n][3]));
    }
#pragma unroll
    for (int i = 1; i < 4; i *= 2) {
      new0 = fmaxf(new0, __shfl_xor_sync(0xffffffffu, new0, i));
      new1 = fmaxf(new1, __shfl_xor_sync(0xffffffffu, new1, i));
    }
    const float old0 = power((top0 - new0) * factor), old1 = power((top1 - new1) * factor);
    top0 = new0; top1 = new1;
    const float less0 = top0 * factor, less1 = top1 * factor;
    sum0 *= old0; sum1 *= old1;
#pragma unroll
    for (int n = 0; n < DP / 8; ++n) {
      o[n][0] *= old0; o[n][1] *= old0; o[n][2] *= old1; o[n][3] *= old1;
    }
    uint32_t p[KEYS / 16][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      const float a = power(s[n][0] * factor - less0), c = power(s[n][1] * factor - less0);
      const float e = power(s[n][2] * factor - less1), g = power(s[n][3] * factor - less1);
      sum0 += a + c;
      sum1 += e + g;
      p[n / 2][n % 2 * 2] = packed(a, c, T());
      p[n / 2][n % 2 * 2 + 1] = packed(e, g, T());
    }
    all_but_one_came();  // the next keys may be on their way
    __syncthreads();
#pragma unroll
    for (int t = 0; t < KEYS / 16; ++t)
#pragma unroll
      for (int n = 0; n < DP / 8; n += 2) {
        uint32_t v[4];
        four_blocks_turned(v, values + (t * 16 + lane % 16) * STRIDE + (n + lane / 16) * 8);
        multiply(o[n], p[t], v[0], v[1], T());
        multiply(o[n + 1], p[t], v[2], v[3], T());
      }
    __syncthreads();
    bring<KEYS, D, STRIDE, WARPS>(values, v_from + next * kv_row, kv_row, S - next, tid);
  }
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    sum0 += __shfl_xor_sync(0xffffffffu, sum0, i);
    sum1 += __shfl_xor_sync(0xffffffffu, sum1, i);
  }
  sum0 = 1.0f / sum0;
  sum1 = 1.0f / sum1;
  // Through shared memory, so that what is written down lies side by side.
  T* mine = held + warp * 16 * STRIDE;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const int d = n * 8 + pair;
    two_at(mine + quad * STRIDE + d) = packed(o[n][0] * sum0, o[n][1] * sum0, T());
    two_at(mine + (quad + 8) * STRIDE + d) = packed(o[n][2] * sum1, o[n][3] * sum1, T());
  }
  __syncwarp();
  T* to = y_out + b * TQ * H * D + h * D;
#pragma unroll
  for (int e = lane; e < 16 * (D / 8); e += 32) {
    const int row = e / (D / 8), d = e % (D / 8) * 8;
    if (first + row < TQ) put<8>(to + (first + row) * H * D + d, fetch<8>(mine + row * STRIDE + d));
  }
"""

ATTENTION_HEADER = """
// KEYS rows of D numbers, of which ``left`` are there, on their way to shared memory.
template <int KEYS, int D, int STRIDE, int WARPS, typename T>
__device__ inline void bring(T* to, const T* from, int step, int left, int tid) {
  constexpr int EACH = STRIDE / 8 - 1;
#pragma unroll
  for (int e = tid; e < KEYS * EACH; e += 32 * WARPS) {
    const int row = e / EACH, d = e % EACH * 8;
    const bool is_there = row < left && d < D;
    if (left > 0)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :: "r"(uint32_t(__cvta_generic_to_shared(to + row * STRIDE + d))),
                      "l"(is_there ? from + row * step + d : from), "r"(is_there ? 16 : 0)
                   : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ inline void all_but_one_came() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
}
template <typename T> __device__ inline void four_blocks(uint32_t* x, const T* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(uint32_t(__cvta_generic_to_shared(at))) : "memory");
}
template <typename T> __device__ inline void four_blocks_turned(uint32_t* x, const T* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(uint32_t(__cvta_generic_to_shared(at))) : "memory");
}
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <typename T> __device__ inline const uint32_t& two_at(const T* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
template <typename T> __device__ inline uint32_t& two_at(T* p) {
  return *reinterpret_cast<uint32_t*>(p);
}
__device__ inline uint32_t packed(float a, float b, half_t) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
  return two;
}
__device__ inline uint32_t packed(float a, float b, bfloat_t) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
  return two;
}
__device__ inline void multiply(float* c, const uint32_t* a, uint32_t x, uint32_t y, half_t) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(y));
}
__device__ inline void multiply(float* c, const uint32_t* a, uint32_t x, uint32_t y, bfloat_t) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(y));
}
"""
