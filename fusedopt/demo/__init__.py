"""The demonstration job: one configuration trained with a stock optimizer and with its fused twin, side by side."""
