// Numbers and names as people read them.

// Bytes as megabytes with three digits that count.
export function megabytes(bytes) {
  const value = bytes / 1e6;
  return value === 0 ? "0" : value.toFixed(value < 0.9995 ? 3 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

export function milliseconds(value) {
  return value.toFixed(value < 99.95 ? 1 : 0);
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

export function readable(name) {
  return name.replaceAll("_", " ");
}

export function nodeName(key) {
  return key === "root" ? "trunk" : key;
}
