// Package space turns "no space left on device" from any step, ours or a
// program's, into one error that names the file system, what is free on it and
// what the step needed.
package space

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"krgimage/images/progress"
)

// Error says that a file system is full or is too small for a step. It matches
// unix.ENOSPC under errors.Is.
type Error struct {
	Doing  string // the step, "the Debian root is built"
	Path   string // where the step writes
	Mount  string // mount point of the file system that Path is on
	Free   int64  // bytes free for this user
	Needed int64  // bytes the step needs; 0: not known
}

func (e *Error) Error() string {
	need := ""
	if e.Needed > 0 {
		need = fmt.Sprintf(", and about %s are needed", progress.Size(e.Needed))
	}
	return fmt.Sprintf("no space left while %s: the file system at %s has %s free%s\n  fix: free some space there, or move %s to a larger file system; what was there before is unchanged",
		e.Doing, e.Mount, progress.Size(e.Free), need, e.Path)
}

// Is makes errors.Is(err, unix.ENOSPC) hold.
func (e *Error) Is(target error) bool { return target == unix.ENOSPC }

// Explain returns err unchanged unless it comes from a full disk or quota; then
// it returns an *Error for path. Needed is in bytes, 0 when not known.
func Explain(err error, doing, path string, needed int64) error {
	var already *Error
	if err == nil || errors.As(err, &already) {
		return err
	}
	if !Explains(err) {
		return err
	}
	return Full(doing, path, needed)
}

// Explains reports whether err comes from a full disk or quota.
func Explains(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// InLog reports whether a program's output speaks of a full disk.
func InLog(log []byte) bool {
	return bytes.Contains(log, []byte("No space left on device")) ||
		bytes.Contains(log, []byte("Disk quota exceeded")) ||
		bytes.Contains(log, []byte("You don't have enough free space"))
}

// Full is the error for a step that found path's file system full.
func Full(doing, path string, needed int64) error {
	free, _ := Free(path)
	return &Error{Doing: doing, Path: path, Mount: MountOf(path), Free: free, Needed: needed}
}

// Require fails with an *Error unless needed bytes are free at path.
func Require(doing, path string, needed int64) error {
	free, err := Free(path)
	if err != nil {
		return fmt.Errorf("free space at %s: %w", path, err)
	}
	if free < needed {
		return Full(doing, path, needed)
	}
	return nil
}

// Free is the number of bytes this user may still write at path, which need
// not exist yet.
func Free(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(existing(path), &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// MountOf is the mount point of the file system that holds path: the longest
// mount point of /proc/self/mountinfo (proc_pid_mountinfo(5)) above it.
func MountOf(path string) string {
	path = existing(path)
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return path
	}
	best := "/"
	for line := range strings.Lines(string(info)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape(fields[4])
		if len(point) > len(best) && (path == point || strings.HasPrefix(path, point+"/")) {
			best = point
		}
	}
	return best
}

// unescape undoes mountinfo's octal escapes of blank, tab, newline, backslash.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// existing is path or its nearest ancestor that exists.
func existing(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	for {
		if _, err := os.Stat(path); err == nil || path == "/" {
			return path
		}
		path = filepath.Dir(path)
	}
}
