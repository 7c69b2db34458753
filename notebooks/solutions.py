"""Answers to the notebooks' exercises: each takes the place of the cell that begins with its name"""

# Exercise 1.1
n_codes = (256 // 16) ** 2
n_patches = n_codes // 4

# Exercise 1.2
def unpatch(targets, p):
    return rearrange(targets, "b (h w) (p1 p2) -> b (h p1 w p2)", h=8 // p, p1=p)

# Exercise 1.3
def gradient(logits, targets):
    histogram = F.one_hot(targets, logits.shape[-1]).float().mean(dim=2)
    positions = logits.shape[0] * logits.shape[1]
    return (logits.softmax(-1) - histogram) / positions

# Exercise 1.4
floor_7779 = -(3 / 4 * np.log(3 / 4) + 1 / 4 * np.log(1 / 4))

# Exercise 2.1
input_5 = {16, 17, 24, 25}

# Exercise 2.2
def may_depend(p, i, j):
    row = j // 8
    column = j % 8
    patch = row // p * (8 // p) + column // p
    return patch < i

# Exercise 2.3
def parameters(n_layer, dim, vocab, classes):
    attention = 4 * dim**2
    feed_forward = 3 * dim * npp.ffn_width(dim)
    norms = 2 * dim
    blocks = n_layer * (attention + feed_forward + norms)
    last_norm = dim
    return blocks + last_norm + 2 * vocab * dim + (classes + 1) * dim

# Exercise 2.4
without_cache = 256 * 257 // 2
with_cache = 256

# Exercise 3.1
ends = [300, 600, 1200]

# Exercise 3.2
three_levels = npp.Config(model="B", patches=(4, 2, 1), lam=2 / 3)

# Exercise 3.3
share_three_quarters = 3 / 4 * 1 / 4 + 1 / 4 * 1

# Exercise 3.4
average_npp, of_stages = bench.cost("B", (2, 1))
average_plain, of_stages = bench.cost("B", (1,))
plain_epochs = 300 * average_npp / average_plain

# Exercise 4.1
epoch = 1000 * 64 // 60000
place = 1000 * 64 % 60000

# Exercise 4.2
divide_by = 16 // 2 // 4

# Exercise 4.3
def train_whole(model, optimizer, cfg):
    pieces = cfg.batch // cfg.micro_batch
    for step in range(cfg.steps):
        p, _, _ = stage(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        codes, labels = naive_batch(step, cfg)
        seed_dropout(step, cfg)
        for c, y in zip(codes.chunk(pieces), labels.chunk(pieces)):
            loss = model.loss(c, y, p) / pieces
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()

# Exercise 5.1
three_level_steps = round(442 * plain / bench.cost("tiny", (4, 2, 1), vocab=256, grid=8)[0])

# Exercise 5.2
def bits_per_image(loss):
    return 64 * loss / math.log(2)

# Exercise 5.3
power_with = 2
power_without = -1

# Exercise 5.4
def at_temperature(probs, temperature):
    raised = probs ** (1 / temperature)
    return raised / raised.sum(-1, keepdim=True)

# Exercise 5.5
def effects(plain_constant, plain_npp, patches_constant, patches_npp):
    schedule = plain_npp - plain_constant
    patches = patches_constant - plain_constant
    interaction = patches_npp - plain_constant - schedule - patches
    return schedule, patches, interaction

# Exercise 6.1
def squared_distance(x, y):
    return ((np.sort(x) - np.sort(y)) ** 2).mean()

# Exercise 6.2
def at_infinity(at_500, at_2000):
    slope = (at_500 - at_2000) / (1 / 500 - 1 / 2000)
    return at_2000 - slope / 2000

# Exercise 6.3
lower_without_trousers = "recall"
recall_of_200 = 200 / 2000

# Exercise 6.4
goes_to_zero = "KID"

# Exercise 7.1
def perplexity(codes):
    share = np.bincount(codes.flatten(), minlength=256) / codes.size
    share = share[share > 0]
    entropy = -(share * np.log(share)).sum()
    return np.exp(entropy)

# Exercise 7.2
candidates = [28, 32, 40, 48, 64, 66]
possible = [size for size in candidates if size % 16 == 0]

# Exercise 7.3
steps_as_imagenet = 300 * n_pictures / 16

# Exercise 7.4
def share_equal(a, b):
    return (a == b).float().mean(dim=1)
