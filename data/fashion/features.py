"""The network behind FD(fashion-classifier): what Inception is to FID, for the embedded data

    python data/fashion/features.py TRAIN.npz TEST.npz data/fashion   # features.pt, reference.npz

A classifier of 90 thousand parameters, trained once, on the train split alone, and then frozen, so
that samples of any model can be compared through its last features. Minutes on a CPU.
"""
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import fid
from common import BadInput, generator, one_line_errors, write_atomically

def train_classifier(images, labels, name, steps=4000, batch=128, lr=4e-3, seed=0):
    """uint8 images (n, H, W, 3), labels (n,) -> what to save"""
    torch.manual_seed(seed)
    net = fid.Classifier(name, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        index = generator(seed, step).integers(len(images), size=batch)
        logits = net.logits(net(torch.from_numpy(images[index]))[0])
        loss = F.cross_entropy(logits, torch.from_numpy(labels[index]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"\rstep {step + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {"model": net.half().state_dict(), "name": name}  # half the bytes

@one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 3:
        raise BadInput("expected TRAIN.npz TEST.npz FOLDER")
    train, test, folder = fid.Images(argv[0]), fid.Images(argv[1]), argv[2]
    for images in train, test:
        if images.labels is None:
            raise BadInput(f"{images.path}: expected labels beside arr_0")
    path, reference = (os.path.join(folder, name) for name in ("features.pt", "reference.npz"))
    name = f"{os.path.basename(os.path.abspath(folder))}-classifier"
    saved = train_classifier(train[:], train.labels, name)
    write_atomically(path, lambda f: torch.save(saved, f))
    net = fid.load_network(path)
    fid.save_reference(reference, net, train, arr_0=test[:], labels=test.labels)
    print(fid.evaluate(net, test, test.labels, reference))
    return 0

if __name__ == "__main__":
    sys.exit(main())
