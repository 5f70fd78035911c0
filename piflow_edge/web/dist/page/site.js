/** What the page is served with, as `site.json` says it. */
export {};
