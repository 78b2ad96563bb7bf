"""The engine of a dispatch: stage, push to each target, run the script at the end, report. Drivers don't import it."""
