"""Speed: training steps side by side, and allocation events by themselves."""
