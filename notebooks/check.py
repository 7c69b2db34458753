"""Checks of the notebooks' exercises. This file gives answers away: solve an exercise first.

A notebook calls check("1.1", n_codes, n_patches). It prints that the answer is right, that there is
no answer yet, or a hint. Each function below judges one exercise: it gets the answers, and returns
a hint if they are wrong and nothing if they are right.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import npp

JUDGES = {}


class NotAnswered(Exception):
    pass


def check(number, *answers):
    """Judge the answers to the exercise of this number, a string such as 1.1, and print it"""
    try:
        for answer in answers:
            if answer is ...:
                raise NotAnswered
        hint = JUDGES[number](*answers)
    except NotAnswered:
        print(f"Exercise {number}: not answered yet")
        return
    if hint:
        print(f"Exercise {number}: not right. Hint: {hint}")
    else:
        print(f"Exercise {number}: right")


def exercise(number):
    def register(judge):
        JUDGES[number] = judge
        return judge
    return register


def call(function, *inputs):
    """What the reader's function returns"""
    result = function(*inputs)
    if result is ...:
        raise NotAnswered
    return result


def is_near(answer, truth, tolerance=1e-6):
    """Whether a number, an array or a tensor has the right shape and the right values"""
    answer = torch.as_tensor(answer, dtype=torch.float64)
    truth = torch.as_tensor(truth, dtype=torch.float64)
    return answer.shape == truth.shape and torch.allclose(answer, truth, rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------------------------
# 1. Tokens and patches


@exercise("1.1")
def codes_and_patches(n_codes, n_patches):
    if n_codes != 256:
        return "how many codes are along one side, if 16 pixels make one code?"
    if n_patches != 64:
        return "how many codes are in one patch of 2 x 2?"


@exercise("1.2")
def unpatch(function):
    codes = torch.from_numpy(np.random.default_rng(0).integers(256, size=(3, 64)))
    for p in (1, 2, 4):
        back = call(function, npp.patch_targets(codes, p), p)
        if back.shape != codes.shape:
            return f"at p = {p} the shape is {tuple(back.shape)}, expected {tuple(codes.shape)}"
        if not torch.equal(back, codes):
            return f"at p = {p} some codes are elsewhere; swap the sides in npp.patch_targets"


@exercise("1.3")
def gradient(function):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((2, 16, 256), np.float32)).requires_grad_()
    targets = torch.from_numpy(rng.integers(256, size=(2, 16, 4)))
    npp.npp_loss(logits, targets).backward()
    answer = call(function, logits.detach(), targets)
    if is_near(answer, logits.grad, 1e-7):
        return None
    if is_near(answer, 32 * logits.grad, 1e-6):
        return "nearly: the loss is a mean over the positions"
    return "what is predicted, minus what is wanted: F.one_hot helps with the histogram"


@exercise("1.4")
def floor_of_patch(floor):
    if not is_near(floor, -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)), 1e-3):
        return "the histogram is (3/4, 1/4): what is its entropy, with the natural logarithm?"


# -------------------------------------------------------------------------------------------------
# 2. The transformer


@exercise("2.1")
def input_at_5(codes):
    if set(codes) == {18, 19, 26, 27}:
        return "this is the patch that position 5 predicts"
    if set(codes) != {16, 17, 24, 25}:
        return "which patch is the input at position 5? There are four patches in a row"


@exercise("2.2")
def may_depend(function):
    for p in (1, 2, 4):
        places = npp.patch_targets(torch.arange(64)[None], p)[0]        # (N/K, K)
        for i in range(len(places)):
            seen = places[:i].flatten().tolist()
            for j in range(64):
                if bool(call(function, p, i, j)) != (j in seen):
                    return f"look at p = {p}, position {i}, code {j}: which patch holds this code?"


@exercise("2.3")
def parameters(function):
    for size in ("tiny", "L", "3B"):
        n_layer = npp.SIZES[size]["n_layer"]
        dim = npp.SIZES[size]["dim"]
        with torch.device("meta"):
            model = npp.Transformer(**npp.SIZES[size], vocab=16384, classes=1000, grid=16)
        truth = sum(w.numel() for w in model.parameters())
        answer = call(function, n_layer, dim, 16384, 1000)
        if answer != truth:
            return (f"for {size} you are off by {answer - truth:,}; the table above lists the "
                    "parts, and its norms and class embeddings have a + 1 each")


@exercise("2.4")
def positions_run(without_cache, with_cache):
    if without_cache != sum(range(257)):
        return "without a cache the first step runs 1 position, the second 2, and the last 256"
    if with_cache != 256:
        return "with a cache every step runs the new position only"


# -------------------------------------------------------------------------------------------------
# 3. Schedule and cost


@exercise("3.1")
def stage_ends(ends):
    if list(ends) != [end for _, _, end in npp.stages(1200, (4, 2, 1), 1 / 2)]:
        return "the last stage ends with the run, and each one before it at lam times the next end"


@exercise("3.2")
def three_levels(cfg):
    if cfg.model != "B":
        return f"the size is {cfg.model}, B was asked for"
    if tuple(cfg.patches) != (4, 2, 1):
        return f"patches is {cfg.patches}, three levels were asked for"
    if npp.stages(900, cfg.patches, cfg.lam) != [(4, 0, 400), (2, 400, 600), (1, 600, 900)]:
        return "lam must be one number, whose square is where the first stage ends"


@exercise("3.3")
def share_three_quarters(share):
    if not is_near(share, 0.4375):
        return "which share of the steps costs a quarter, and which share costs all?"


@exercise("3.4")
def plain_epochs(epochs):
    if not is_near(epochs, 187.95, 0.1):
        return "cost per image times epochs must be the same for both runs"


# -------------------------------------------------------------------------------------------------
# 4. Train by hand


@exercise("4.1")
def first_image(epoch, place):
    if (epoch, place) != divmod(1000 * 64, 60000):
        return "how many images have the steps before it taken? Both numbers count from 0"


@exercise("4.2")
def divide_by(number):
    if number == 4:
        return "averaging over the two ranks is a division too, and happens later"
    if number != 2:
        return "into how many pieces does one rank cut its share of the batch?"


@exercise("4.3")
def train_whole(function, new_model, cfg, expected):
    model, optimizer = new_model(cfg)
    start = model.output.weight.detach().clone()
    call(function, model, optimizer, cfg)
    found = model.state_dict()
    if torch.equal(found["output.weight"], start):
        return "the weights are still those of the new model: is optimizer.step() called?"
    for name, weight in expected.items():
        if not torch.equal(found[name], weight):
            return (f"{name} is off by up to {(found[name] - weight).abs().max():.0e}. "
                    "In each step: the rate, one seed for dropout before all micro-batches, each "
                    "loss divided by their number, then clip, update, and clear the gradient")


# -------------------------------------------------------------------------------------------------
# 5. Compare
@exercise("5.1")
def three_level_steps(steps):
    weights = 4 * (4 * 128**2 + 3 * 128 * npp.ffn_width(128)) + 128 * 256
    average = weights * (5 / 4 + 17 / 4 + 65 / 2)
    if not is_near(steps, round(442 * weights * 65 / average), 1):
        return "442 steps at the cost of `plain` are as many steps of (4, 2, 1) at which cost?"


@exercise("5.2")
def bits_per_image(function):
    answer = call(function, 2.0)
    if is_near(answer, 2.0 / math.log(2)):
        return "this is for one code"
    if not is_near(answer, 64 * 2.0 / math.log(2)):
        return "an image has 64 codes, and the loss of each is in nats"


@exercise("5.3")
def powers(power_with, power_without):
    if power_with + power_without != 1:
        return "at guidance 1 the powers are 1 and 0; their sum does not depend on the scale"
    if (power_with, power_without) != (2, -1):
        return "put s = 2 into u + s (c - u), and collect what belongs to c and to u"


@exercise("5.4")
def at_temperature(function):
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 256)))
    answer = call(function, logits.softmax(-1), 0.5)
    truth = (logits / 0.5).softmax(-1)
    if is_near(answer, truth):
        return None
    if is_near(F.normalize(answer, p=1, dim=-1), truth):
        return "nearly: each row must sum to 1"
    return "exp(logits / temperature) is exp(logits) to which power?"


@exercise("5.5")
def effects(function):
    answer = call(function, 3.6, 3.4, 3.8, 3.5)
    if is_near(answer, (-0.2, 0.2, -0.1)):
        return None
    if is_near(sum(answer), -0.1):
        return "the sum is right: which two of the four runs differ in the schedule alone?"
    return "the three parts must add up to the loss of NPP's recipe minus that of LlamaGen's"


# -------------------------------------------------------------------------------------------------
# 6. Evaluate


@exercise("6.1")
def squared_distance(function):
    x = np.array([3.0, 1.0, 2.0])
    y = np.array([5.0, 7.0, 6.0])
    if not is_near(call(function, x, y), 16):
        return "for 3, 1, 2 and 5, 7, 6: who goes to 5? Then the mean of the squared differences"
    if not is_near(call(function, x, 2 * x), 14 / 3):
        return "for 3, 1, 2 and 6, 2, 4: the mean of squares, and not the square of the mean"


@exercise("6.2")
def at_infinity(function):
    for value in (1.0, 7.0):
        answer = call(function, value + 2000 / 500, value + 2000 / 2000)
        if not is_near(answer, value):
            return "the distance is a + b / n: two equations with two unknowns, and a is wanted"


@exercise("6.3")
def precision_and_recall(lower, recall):
    if lower != "recall":
        return "each picture is real, so it lies in a ball; but does each real one lie in one?"
    if not is_near(recall, 0.1, 0.01):
        return "the third neighbour of an image that is there ten times is the image itself"


@exercise("6.4")
def goes_to_zero(name):
    if str(name).upper() != "KID":
        return "an average removes chance; it does not remove a bias"


# -------------------------------------------------------------------------------------------------
# 7. Your own images


@exercise("7.1")
def perplexity(function):
    if not is_near(call(function, np.arange(256)), 256):
        return "if each code occurs once, the perplexity is 256"
    if not is_near(call(function, np.array([[7, 7], [7, 7]])), 1):
        return "if only one code occurs, the perplexity is 1 (and log 0 must not be asked for)"
    if not is_near(call(function, np.array([0, 0, 1, 1])), 2):
        return "two codes, equally frequent, have a perplexity of 2"


@exercise("7.2")
def possible_sizes(sizes):
    if sorted(sizes) != [32, 48, 64]:
        return "the grid is the image size divided by 4, and the largest p must divide the grid"


@exercise("7.3")
def steps_as_imagenet(steps, n_pictures):
    if not is_near(steps, 300 * n_pictures / 16, 1):
        return "300 visits to each picture, 16 pictures in a step"


@exercise("7.4")
def share_equal(function):
    a = torch.tensor([[1, 2, 3, 4], [1, 1, 1, 1]])
    b = torch.tensor([[1, 0, 3, 0], [1, 1, 1, 2]])
    answer = call(function, a, b)
    if tuple(answer.shape) != (2,):
        return f"the shape is {tuple(answer.shape)}, expected one number per pair"
    if not is_near(answer, [0.5, 0.75]):
        return "of the codes 1 2 3 4 and 1 0 3 0 a half is equal"
