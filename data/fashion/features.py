"""The network behind FD(fashion-classifier): what Inception is to FID, for the embedded data

    python data/fashion/features.py TRAIN.npz TEST.npz data/fashion   # features.pt, reference.npz

A classifier of 90 thousand parameters, trained once, on the train split alone, and then frozen, so
that samples of any model can be compared through its last features. Minutes on a CPU.
"""

import io
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import fid


def train_classifier(images, labels, name, steps=4000, batch=128, lr=4e-3, seed=0):
    """uint8 images (n, H, W, 3), labels (n,) -> what to save"""
    torch.manual_seed(seed)
    net = fid.Classifier(name, int(labels.max()) + 1)
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
    return {"model": net.half().state_dict(), "name": name}  # half the bytes


def train(train_path, test_path, folder):
    train_images = fid.Images(train_path)
    test_images = fid.Images(test_path)
    for images in train_images, test_images:
        fid.require(images.labels is not None, f"{images.path}: expected labels beside arr_0")
    fid.require(os.path.isdir(folder), f"{folder}: expected a folder that exists")

    name = os.path.basename(os.path.abspath(folder)) + "-classifier"
    labels = train_images.labels.astype(np.int64)
    data = io.BytesIO()
    torch.save(train_classifier(train_images[:], labels, name), data)
    weights = os.path.join(folder, "features.pt")
    fid.write_atomically(weights, data.getvalue())

    # The statistics are those of the train split, the images those of the test split.
    net = fid.load_network(weights)
    reference = os.path.join(folder, "reference.npz")
    fid.save_reference(reference, net, train_images,
                       arr_0=test_images[:], labels=test_images.labels)
    print(fid.evaluate(net, test_images, test_images.labels, reference))


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    try:
        fid.require(len(argv) == 3, "expected TRAIN.npz TEST.npz FOLDER")
        train(*argv)
        return 0
    except fid.BadInput as error:
        print(f"features.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
