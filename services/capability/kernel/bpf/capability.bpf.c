/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Capability sets of processes, kept by the kernel beside each process and
 * handed on at fork before the child exists for anybody.
 *
 * The sets are those of the thread-group leader. lsm/task_alloc runs inside
 * copy_process() and can make a fork fail that could not inherit. Kernels that
 * load no LSM programs get the tracepoint sched_process_fork instead: exact as
 * well, but the child's pid is visible a moment before its sets are.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define CLONE_THREAD 0x00010000
#define ENOMEM 12

struct task_struct {
	int pid;
	int tgid;
	struct task_struct *group_leader;
} __attribute__((preserve_access_index));

struct linux_binprm;

struct sets {
	__u32 permitted;
	__u32 effective;
	__u32 inheritable_permitted;
	__u32 inheritable_effective;
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sets);
} table SEC(".maps");

/* Forks whose child got no sets though its parent had some. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline void count_lost(void)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&lost, &zero);

	if (n)
		*n += 1;
}

/* What a child of a process with the sets p begins with (Sets.Fork). */
static __always_inline struct sets forked(const struct sets *p)
{
	struct sets c = {
		.permitted = p->inheritable_permitted,
		.effective = p->inheritable_effective & p->inheritable_permitted,
		.inheritable_permitted = p->inheritable_permitted,
		.inheritable_effective = p->inheritable_effective,
	};
	return c;
}

SEC("lsm/task_alloc")
int BPF_PROG(task_alloc, struct task_struct *child, unsigned long clone_flags, int ret)
{
	struct sets *p, c;

	if (ret || clone_flags & CLONE_THREAD)
		return ret;
	p = bpf_task_storage_get(&table, bpf_get_current_task_btf()->group_leader, 0, 0);
	if (!p)
		return 0;
	c = forked(p);
	if (!bpf_task_storage_get(&table, child, &c, BPF_LOCAL_STORAGE_GET_F_CREATE)) {
		count_lost();
		return -ENOMEM;
	}
	return 0;
}

/*
 * When a thread that isn't the leader calls exec, the old leader goes away with
 * all that is kept beside it, so the thread takes a copy first.
 */
SEC("lsm/bprm_creds_for_exec")
int BPF_PROG(exec, struct linux_binprm *bprm, int ret)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct sets *from, *to;

	if (ret || t->pid == t->tgid)
		return ret;
	from = bpf_task_storage_get(&table, t->group_leader, 0, 0);
	if (!from)
		return 0;
	to = bpf_task_storage_get(&table, t, from, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!to)
		return -ENOMEM;
	*to = *from;
	return 0;
}

/* Without LSM programs each thread carries a copy from its birth for that. */
SEC("tp_btf/sched_process_fork")
int BPF_PROG(process_fork, struct task_struct *parent, struct task_struct *child)
{
	struct sets *p = bpf_task_storage_get(&table, parent->group_leader, 0, 0), c;

	if (!p)
		return 0;
	c = child->pid == child->tgid ? forked(p) : *p;
	if (!bpf_task_storage_get(&table, child, &c, BPF_LOCAL_STORAGE_GET_F_CREATE))
		count_lost();
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
