/** What a policy is: one network output as a velocity field that holds for a whole segment. */
export {};
