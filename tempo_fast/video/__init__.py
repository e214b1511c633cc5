"""Video files to pixels: probe, frame sampling, decoders, preprocessing."""
