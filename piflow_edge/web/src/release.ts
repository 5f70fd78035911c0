/** Of this package, and of the Python package that it comes from. */
export const RELEASE = "0.1.0";
