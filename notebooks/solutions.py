"""Answers to the notebooks' exercises: each section takes the place of the cell of that name"""

# Exercise 1.1
n_codes = (256 // 16) ** 2
n_patches = n_codes // 4

# Exercise 1.2
def unpatch(targets, p):
    return rearrange(targets, "b (h w) (p1 p2) -> b (h p1 w p2)", h=8 // p, p1=p)

# Exercise 1.3
def gradient(logits, targets):
    histogram = F.one_hot(targets, logits.shape[-1]).float().mean(dim=2)
    return (logits.softmax(-1) - histogram) / (logits.shape[0] * logits.shape[1])

# Exercise 1.4
floor_7779 = -(3 / 4 * np.log(3 / 4) + 1 / 4 * np.log(1 / 4))

# Exercise 2.1
input_5 = {16, 17, 24, 25}

# Exercise 2.2
def may_depend(p, i, j):
    row, column = j // 8, j % 8
    return row // p * (8 // p) + column // p < i

# Exercise 2.3
def parameters(n_layer, dim, vocab, classes):
    layer = 4 * dim**2 + 3 * dim * npp.ffn_width(dim) + 2 * dim
    return n_layer * layer + dim + 2 * vocab * dim + (classes + 1) * dim

# Exercise 2.4
without_cache = 256 * 257 // 2
with_cache = 256

# Exercise 3.1
ends = [end for p, first, end in npp.spans(1200, (4, 2, 1), 1 / 2)]

# Exercise 3.2
three_levels = npp.Config(model="B", patches=(4, 2, 1), lam=2 / 3)

# Exercise 3.3
share_three_quarters = 3 / 4 * 1 / 4 + 1 / 4 * 1

# Exercise 3.4
plain_epochs = 300 * npp.cost("B", (2, 1))[0] / npp.cost("B", (1,))[0]

# Exercise 4.1
plain_steps = round(steps * average / plain)

# Exercise 4.2
bits = 64 * loss / math.log(2)

# Exercise 4.3
def guided(c, u, s):
    return u + s * (c - u)

# Exercise 4.4
def at_temperature(probs, T):
    raised = probs ** (1 / T)
    return raised / raised.sum(-1, keepdim=True)

# Exercise 5.1
def way(x, y):
    return ((np.sort(x) - np.sort(y)) ** 2).mean()

# Exercise 5.2
def at_infinity(at_500, at_2000):
    slope = (at_500 - at_2000) / (1 / 500 - 1 / 2000)
    return at_2000 - slope / 2000

# Exercise 5.3
lower_without_trousers = "recall"
recall_of_200 = 200 / 2000

# Exercise 5.4
goes_to_zero = "KID"

# Exercise 6.1
def perplexity(codes):
    p = np.bincount(codes.flatten(), minlength=256) / codes.size
    p = p[p > 0]
    return np.exp(-(p * np.log(p)).sum())

# Exercise 6.2
candidates = [28, 32, 40, 48, 64, 66]
possible = [size for size in candidates if size % 4 == 0 and size // 4 % 4 == 0]

# Exercise 6.3
visits = 16 * steps / len(codes)

# Exercise 6.4
def share_equal(a, b):
    return (a == b).float().mean(1)
