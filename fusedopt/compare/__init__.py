"""One config, trained with a stock optimizer and with its fused twin, side by side."""
