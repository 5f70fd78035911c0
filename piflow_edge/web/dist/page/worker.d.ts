/** Draws in a thread of its own, so that the page goes on meanwhile. */
export {};
