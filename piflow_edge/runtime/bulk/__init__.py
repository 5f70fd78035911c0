"""Many images into a folder of shards: any number of workers, stopped and started at any time, the same files."""
