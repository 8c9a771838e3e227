"""What a run leaves behind and goes on with: checkpoint, log, samples, report."""
