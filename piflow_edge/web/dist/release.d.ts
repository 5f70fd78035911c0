/** Of this package, and of the Python package that it comes from. */
export declare const RELEASE = "0.1.0";
