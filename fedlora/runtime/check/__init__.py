"""What a run will be, told before it begins: `fedlora check`, from sizes and shapes alone or with `--measure`."""
