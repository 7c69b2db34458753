"""The network behind FD(fashion-classifier): what Inception is to FID, for the embedded data

    python data/fashion/features.py TRAIN.npz TEST.npz FOLDER   # features.pt, reference.npz

A classifier of 90 thousand parameters, trained once, on the train split alone, and then frozen, so
that samples of any model can be compared through its last features. Minutes on a CPU.
"""

import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import fid


def read_labelled(path):
    """-> images uint8 (n, H, W, 3), labels (n,)"""
    with fid.naming(path, "an .npz with arr_0 and labels"), np.load(path) as arrays:
        return arrays["arr_0"], arrays["labels"].astype(np.int64)


def train_classifier(images, labels, name, steps=4000, batch=128, lr=4e-3, seed=0):
    """uint8 images (n, H, H, 3), labels (n,) -> what to save"""
    torch.manual_seed(seed)
    size = images.shape[1]
    net = fid.Classifier(name, int(labels.max()) + 1, size)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        rows = np.random.default_rng((seed, step)).integers(len(images), size=batch)
        features = net(torch.from_numpy(images[rows]))[0]
        loss = F.cross_entropy(net.logits(features), torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr)
    return {"model": net.half().state_dict(), "name": name, "size": size}  # half the bytes


def train(train_path, test_path, folder):
    weights = os.path.join(folder, "features.pt")
    reference = os.path.join(folder, "reference.npz")
    fid.require(os.path.isdir(folder), f"{folder}: no such folder")
    for path in weights, reference:
        fid.require(not os.path.lexists(path), f"{path}: exists already, expected a new file")
    images, labels = read_labelled(train_path)
    test_images, test_labels = read_labelled(test_path)

    name = os.path.basename(os.path.abspath(folder)) + "-classifier"
    saved = train_classifier(images, labels, name)
    torch.save(saved, weights + ".part")
    os.replace(weights + ".part", weights)  # whole, or not there

    # The statistics are those of the train split, the images those of the test split.
    net = fid.load_network(weights)
    fid.save_reference(reference, net, train_path, arr_0=test_images, labels=test_labels)
    print(fid.evaluate(net, test_path, reference))


def main(argv=None):
    """Train and write. Raises BadInput."""
    arguments = sys.argv[1:] if argv is None else argv
    fid.require(len(arguments) == 3, "expected TRAIN.npz TEST.npz FOLDER")
    train(*arguments)


if __name__ == "__main__":
    try:
        main()
    except fid.BadInput as error:
        print("features.py:", error, file=sys.stderr)
        sys.exit(2)
