/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Refuses a fork or a new thread whose process id might lie outside of the range
 * that its PID namespace has been given.
 *
 * The allocator gives the first free id at or after its cursor (idr_next). With
 * the cursor in [first, reserve) the id is below end as long as something is free
 * there, so ids from reserve on are counted as they are given, and when they run
 * low all forks fail until user space has counted which of them are free again.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#define EAGAIN 11
#define MAX_LEVEL 32 /* MAX_PID_NS_LEVEL */

struct ns_common {
	unsigned int inum;
} __attribute__((preserve_access_index));

struct idr {
	unsigned int idr_next;
} __attribute__((preserve_access_index));

struct pid_namespace {
	struct idr idr;
	struct pid_namespace *parent;
	unsigned int level;
	struct ns_common ns;
} __attribute__((preserve_access_index));

struct nsproxy {
	struct pid_namespace *pid_ns_for_children;
} __attribute__((preserve_access_index));

struct upid {
	int nr;
	struct pid_namespace *ns;
} __attribute__((preserve_access_index));

struct pid {
	unsigned int level;
	struct upid numbers[];
} __attribute__((preserve_access_index));

struct task_struct {
	struct nsproxy *nsproxy;
	struct pid *thread_pid;
} __attribute__((preserve_access_index));

struct span {
	__u32 first;
	__u32 reserve; /* ids from here to end are only given when the rest is full */
	__u32 end;
	__u32 given;   /* ids at or after reserve that may be in use */
	__u32 allowed; /* how many of them may be given */
	__u32 refused; /* forks that failed */
	__u32 outside; /* ids given outside of the range: never, unless this was loaded late */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u32); /* inode number of the PID namespace */
	__type(value, struct span);
} spans SEC(".maps");

SEC("lsm/task_alloc")
int BPF_PROG(check, struct task_struct *child, unsigned long clone_flags, int ret)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct pid_namespace *ns;
	int i;

	if (ret)
		return ret;
	ns = BPF_CORE_READ(t, nsproxy, pid_ns_for_children);
	/* A namespace made inside the container takes an id in the container's, too. */
	for (i = 0; i < MAX_LEVEL && ns; i++) {
		__u32 inum = BPF_CORE_READ(ns, ns.inum);
		struct span *s = bpf_map_lookup_elem(&spans, &inum);

		if (s) {
			__u32 next = BPF_CORE_READ(ns, idr.idr_next);

			if (next >= s->first && next < s->reserve && s->given < s->allowed)
				return 0;
			__sync_fetch_and_add(&s->refused, 1);
			return -EAGAIN;
		}
		ns = BPF_CORE_READ(ns, parent);
	}
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(given, struct task_struct *parent, struct task_struct *child)
{
	struct pid *pid = BPF_CORE_READ(child, thread_pid);
	unsigned int level = BPF_CORE_READ(pid, level);
	int i;

	for (i = 0; i < MAX_LEVEL && i <= level; i++) {
		struct upid u;
		struct span *s;
		__u32 inum;

		if (bpf_core_read(&u, sizeof(u), &pid->numbers[i]))
			break;
		inum = BPF_CORE_READ(u.ns, ns.inum);
		s = bpf_map_lookup_elem(&spans, &inum);
		if (!s)
			continue;
		if ((__u32)u.nr >= s->reserve && (__u32)u.nr < s->end)
			__sync_fetch_and_add(&s->given, 1);
		if ((__u32)u.nr < s->first || (__u32)u.nr >= s->end)
			__sync_fetch_and_add(&s->outside, 1);
		break;
	}
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
