"""Speed, memory and quality, side by side in one run."""
