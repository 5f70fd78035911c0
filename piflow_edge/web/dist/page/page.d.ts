/** The page: a form, and what became of it. */
export {};
