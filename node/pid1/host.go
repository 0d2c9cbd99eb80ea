package pid1

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cgroupDir is the container's control group.
const cgroupDir = "/sys/fs/cgroup/container"

// mountPrivate mounts what is the node's own, besides what stage 1 brought.
func mountPrivate() error {
	for _, m := range []struct {
		fstype, dir string
		flags       uintptr
		data        string
		optional    bool
	}{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5", false},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", false},
		{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777,size=20%", false},
		{"cgroup2", "/sys/fs/cgroup", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "", true},
	} {
		if m.fstype != "cgroup2" {
			if err := os.MkdirAll(m.dir, 0o755); err != nil {
				return err
			}
		}
		err := unix.Mount(m.fstype, m.dir, m.fstype, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) && !m.optional {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.dir, err)
		}
	}
	// Stage 1 brought lo up already, unless somebody else started us.
	if lo, err := netlink.LinkByName("lo"); err == nil {
		_ = netlink.LinkSetUp(lo)
	}
	return nil
}

// containerCgroup makes the container's control group; nil when there is none
// to be had, which costs only the certainty of killing all of it at once.
func containerCgroup(log *slog.Logger) *os.File {
	if err := os.Mkdir(cgroupDir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		log.Warn("the container has no control group", "err", err)
		return nil
	}
	f, err := os.Open(cgroupDir)
	if err != nil {
		log.Warn("the container has no control group", "err", err)
		return nil
	}
	return f
}

// maxClockError is how wrong the clock may be before it is stepped.
const maxClockError = time.Second

// setClock steps the system clock to now if it is off, and the hardware clock
// along, so that the next boot starts out right.
func (m *machine) setClock(now time.Time) {
	off := time.Until(now)
	if off.Abs() <= maxClockError {
		return
	}
	tv := unix.NsecToTimeval(now.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		m.log.Warn("the clock stays wrong", "off", off.Round(time.Millisecond), "err", err)
		return
	}
	m.log.Info("clock stepped to the head's", "by", off.Round(time.Millisecond), "rtc", setRTC(now))
}

// setRTC reports in a word whether it could set the hardware clock.
func setRTC(now time.Time) string {
	f, err := os.OpenFile("/dev/rtc0", os.O_WRONLY, 0)
	if err != nil {
		return "none"
	}
	defer f.Close()
	u := now.UTC()
	err = unix.IoctlSetRTCTime(int(f.Fd()), &unix.RTCTime{
		Sec: int32(u.Second()), Min: int32(u.Minute()), Hour: int32(u.Hour()),
		Mday: int32(u.Day()), Mon: int32(u.Month()) - 1, Year: int32(u.Year()) - 1900,
	})
	if err != nil {
		return "not set: " + err.Error()
	}
	return "set"
}
