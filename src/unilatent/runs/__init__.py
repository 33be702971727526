"""The files of a run folder: checkpoints, journal, lock, crash reports, EMA snapshots; listing and curves of runs."""
