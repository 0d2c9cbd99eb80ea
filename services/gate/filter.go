package gate

import (
	"fmt"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"krgimage/services/pids"
)

// Offsets in struct seccomp_data (linux/seccomp.h). Pids and flags are in the
// low halves of the arguments.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// auditX8664 is AUDIT_ARCH_X86_64. Other ABIs (32-bit programs) pass: they work,
// but don't see processes of other nodes.
const auditX8664 = 0xc000003e

// what of a system call comes to the gate.
type rule int

const (
	always  rule = iota // each call
	process             // clone unless it makes a thread
	refuse              // clone3: its flags can't be seen by a filter; libc falls back on clone
	pid                 // the first argument is a process of another node; 0 is the caller itself
	target              // the same for kill: 0 and negative numbers are groups
	who                 // the second argument is, if the first says process or group
)

// rules are the gated system calls of x86-64. Those that name a process but can
// do nothing with one of another node (ptrace, process_vm_readv, pidfd_open)
// aren't here: the kernel says ESRCH, which is the truth.
var rules = map[int32]rule{
	unix.SYS_FORK: always, unix.SYS_VFORK: always,
	unix.SYS_CLONE: process, unix.SYS_CLONE3: refuse,
	unix.SYS_KILL:  target,
	unix.SYS_TKILL: pid, unix.SYS_TGKILL: pid, unix.SYS_RT_SIGQUEUEINFO: pid, unix.SYS_RT_TGSIGQUEUEINFO: pid,
	unix.SYS_GETPGID: pid, unix.SYS_SETPGID: pid, unix.SYS_GETSID: pid,
	unix.SYS_SCHED_SETPARAM: pid, unix.SYS_SCHED_GETPARAM: pid, unix.SYS_SCHED_SETSCHEDULER: pid, unix.SYS_SCHED_GETSCHEDULER: pid,
	unix.SYS_SCHED_RR_GET_INTERVAL: pid, unix.SYS_SCHED_SETAFFINITY: pid, unix.SYS_SCHED_GETAFFINITY: pid,
	unix.SYS_SCHED_SETATTR: pid, unix.SYS_SCHED_GETATTR: pid, unix.SYS_PRLIMIT64: pid,
	unix.SYS_GETPRIORITY: who, unix.SYS_SETPRIORITY: who, unix.SYS_IOPRIO_GET: who, unix.SYS_IOPRIO_SET: who,
}

// verdicts
var (
	allow  = bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	notify = bpf.RetConstant{Val: unix.SECCOMP_RET_USER_NOTIF}
	nosys  = bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
)

// filter is the program for a node whose own processes are in r.
func filter(r pids.Range) []bpf.Instruction {
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditX8664, SkipTrue: 1},
		allow,
		bpf.LoadAbsolute{Off: offNr, Size: 4},
	}
	// In the order of their numbers, so that the program is always the same.
	for nr := int32(0); nr < 512; nr++ {
		rule, ok := rules[nr]
		if !ok {
			continue
		}
		body := rule.body(r)
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(nr), SkipTrue: uint8(len(body))})
		program = append(program, body...)
	}
	return append(program, allow)
}

// body decides about one system call; every path through it ends.
func (k rule) body(r pids.Range) []bpf.Instruction {
	arg := func(i uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offArgs + 8*i, Size: 4} }
	// One of this node's, or no process of anybody: ids below FirstUser are each
	// node's own, those from Max on don't exist.
	remote := []bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: pids.FirstUser, SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: pids.Max, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: uint32(r.First), SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: uint32(r.End), SkipTrue: 1},
		notify,
		allow,
	}
	switch k {
	case always:
		return []bpf.Instruction{notify}
	case process:
		return []bpf.Instruction{arg(0), bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.CLONE_THREAD, SkipTrue: 1}, notify, allow}
	case refuse:
		return []bpf.Instruction{nosys}
	case target:
		return append([]bpf.Instruction{
			arg(0),
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
			bpf.JumpIf{Cond: bpf.JumpLessThan, Val: 1 << 31, SkipTrue: 1},
			notify,
		}, remote...)
	case who:
		// PRIO_PROCESS and PRIO_PGRP are 0 and 1, IOPRIO_WHO_PROCESS and
		// IOPRIO_WHO_PGRP 1 and 2. So some users' numbers come along
		// (PRIO_USER is 2): the daemon lets them pass.
		const user = 2
		return append([]bpf.Instruction{
			arg(0), bpf.JumpIf{Cond: bpf.JumpLessOrEqual, Val: user, SkipTrue: 1}, allow, arg(1),
		}, remote...)
	}
	return append([]bpf.Instruction{arg(0)}, remote...)
}

// assemble is the program as the kernel takes it.
func assemble(r pids.Range) ([]unix.SockFilter, error) {
	raw, err := bpf.Assemble(filter(r))
	if err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	program := make([]unix.SockFilter, len(raw))
	for i, x := range raw {
		program[i] = unix.SockFilter{Code: x.Op, Jt: x.Jt, Jf: x.Jf, K: x.K}
	}
	return program, nil
}
