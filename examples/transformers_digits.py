"""Train a small network on handwritten digits with the Trainer of transformers and a fused optimizer.

    python examples/transformers_digits.py [--epochs N]

On a GPU it trains in float16, with a loss scale. Clipping and, there, unscaling are part of the optimizer's step.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from fusedopt.integrations.transformers import fuse


class Classifier(nn.Module):
    """What the Trainer asks of a model: the loss, and what it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 10))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and scores of a batch."""
        scores = self.layers(images)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def train(epochs: int, folder: str) -> tuple[float, float]:
    """Train, and return the accuracy on images that were left out, and the largest norm of the gradients."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    pairs = zip(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels), strict=True)
    data = [{"images": image, "labels": label} for image, label in pairs]
    args = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=50,
        learning_rate=3e-3,
        weight_decay=0.05,
        warmup_steps=20,
        max_grad_norm=1.0,
        fp16=torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = fuse(Trainer(Classifier(), args, train_dataset=data[:1500]))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    prediction = trainer.predict(data[1500:])
    accuracy = (prediction.predictions.argmax(1) == prediction.label_ids).mean()
    return float(accuracy), max(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="number of epochs (default: %(default)s)")
    torch.set_num_threads(1)  # more threads only wait for each other on so small a network
    with tempfile.TemporaryDirectory() as folder:
        accuracy, norm = train(parser.parse_args().epochs, folder)
    print(f"accuracy {accuracy:.1%} on 297 images that it has not seen; largest norm that was logged {norm:.2f}")


if __name__ == "__main__":
    main()
