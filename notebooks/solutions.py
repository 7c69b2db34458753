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
