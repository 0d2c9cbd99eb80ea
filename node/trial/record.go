package trial

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// recordFile is the name of the record in the trial's directory. It stays when
// a trial has ended: the next one takes the same ssh ports.
const recordFile = "trial.json"

// record is what other processes need to find a trial.
type record struct {
	Supervisor *Process     `json:"supervisor,omitempty"` // nil: the trial has ended
	Started    time.Time    `json:"started"`
	Sockets    string       `json:"sockets,omitempty"` // directory that the trial made outside its own
	Control    string       `json:"control"`           // unix socket
	Nodes      []recordNode `json:"nodes"`
}

type recordNode struct {
	ID      int      `json:"id"`
	MAC     string   `json:"mac"`
	Address string   `json:"address"`
	SSH     string   `json:"ssh"`     // loopback address and port
	Console string   `json:"console"` // unix socket
	QEMU    *Process `json:"qemu,omitempty"`
}

// Process names a process beyond the life of its pid: pids are used again, but
// not with the same start time in the same boot of the host.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, proc(5) stat field 22
	Boot  string `json:"boot"`  // /proc/sys/kernel/random/boot_id
}

func identify(pid int) (*Process, error) {
	start, err := startTime(pid)
	if err != nil {
		return nil, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	return &Process{PID: pid, Start: start, Boot: strings.TrimSpace(string(boot))}, nil
}

func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(stat)
}

// parseStartTime takes the start time of a process that is alive from its stat
// line. The name in parentheses may hold anything, so fields count from the
// last parenthesis.
func parseStartTime(stat []byte) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, errors.New("stat line without a name")
	}
	fields := strings.Fields(string(stat[i+1:])) // from field 3, the state
	if len(fields) < 20 {
		return 0, errors.New("stat line is cut")
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, os.ErrProcessDone
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// open returns a descriptor of the process, so that a signal can hit no other,
// or os.ErrProcessDone.
func (p *Process) open() (fd int, err error) {
	if p == nil || p.PID <= 1 {
		return -1, os.ErrProcessDone
	}
	fd, err = unix.PidfdOpen(p.PID, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return -1, os.ErrProcessDone
		}
		return -1, fmt.Errorf("process %d: %w", p.PID, err)
	}
	// With the descriptor held the pid can't be given away: now compare.
	now, err := identify(p.PID)
	if err != nil || *now != *p {
		unix.Close(fd)
		return -1, os.ErrProcessDone
	}
	return fd, nil
}

// alive reports whether it still runs.
func (p *Process) alive() bool {
	fd, err := p.open()
	if err != nil {
		return !errors.Is(err, os.ErrProcessDone)
	}
	unix.Close(fd)
	return true
}

// end signals the process and waits until it is gone or ctx ends. One that is
// gone already is fine.
func (p *Process) end(ctx context.Context, sig unix.Signal) error {
	fd, err := p.open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	for ctx.Err() == nil {
		// A pidfd is readable once the process has ended (pidfd_open(2)); the
		// short timeout lets ctx be seen.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		}
	}
	return ctx.Err()
}

func loadRecord(dir string) (record, error) {
	var r record
	path := filepath.Join(dir, recordFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%s is damaged (%w): end leftover QEMU processes, if any, and remove the file", path, err)
	}
	return r, nil
}

func (r *record) save(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(dir, recordFile), append(data, '\n'), 0o644)
}

// tidy removes the sockets that a trial which died left behind. The record is a
// file that anybody may have edited: only a directory of ours is removed.
func (r *record) tidy() {
	if r.Sockets != "" && strings.HasPrefix(filepath.Base(r.Sockets), "krgimage-") {
		os.RemoveAll(r.Sockets)
	}
}

// ErrNotRunning: there is no trial on this state directory.
var ErrNotRunning = errors.New("no trial is running")

// ErrRunning: there is one already.
var ErrRunning = errors.New("a trial is running already")

// running loads the record of a trial that runs.
func running(dir string) (record, error) {
	r, err := loadRecord(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return r, ErrNotRunning
	}
	if err == nil && !r.Supervisor.alive() {
		err = ErrNotRunning
	}
	return r, err
}

// Stop ends the trial in dir: its process is asked to end and killed when ctx
// ends first; then no QEMU of it is left. Without a trial it returns
// ErrNotRunning, after leftovers of one that died are gone.
func Stop(ctx context.Context, dir string) error {
	r, err := loadRecord(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNotRunning
	}
	if err != nil {
		return err
	}
	ran := r.Supervisor.alive()
	if err := r.Supervisor.end(ctx, unix.SIGTERM); err != nil {
		if ctx.Err() == nil {
			return fmt.Errorf("stop the trial: %w", err)
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	if err := r.Supervisor.end(last, unix.SIGKILL); err != nil {
		return fmt.Errorf("stop the trial: %w", err)
	}
	// The kernel killed them with their parent; make sure.
	for _, n := range r.Nodes {
		if err := n.QEMU.end(last, unix.SIGKILL); err != nil {
			return fmt.Errorf("stop node %d of the trial: %w", n.ID, err)
		}
	}
	r.tidy()
	if !ran {
		return ErrNotRunning
	}
	return nil
}

// killLimit is how long a killed process may take to disappear: it may first
// have to leave the kernel.
const killLimit = 10 * time.Second
