#ifndef QUIRE_TESTS_C_API_PARTS_H_
#define QUIRE_TESTS_C_API_PARTS_H_

void test_tensors(void);   /* views, DLPack, names of dtypes */
void test_kv_caches(void); /* caches from one tensor, names of their dtypes */
void test_core(void);      /* threads, plans, attention, merge_states; structures of other sizes */
void test_backends(void);  /* what a build has and can do */
void test_serving(void);   /* metadata, builders, layers with forward */

#endif /* QUIRE_TESTS_C_API_PARTS_H_ */
