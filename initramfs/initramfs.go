// Package initramfs makes the stage-1 archive: what a node's kernel unpacks
// into memory before it knows any disk or network.
//
// The archive is a row of members, each a newc cpio archive compressed on its
// own. The kernel accepts that (Documentation/driver-api/early-userspace/
// buffer-format.rst), and it lets the build make each member only when its own
// inputs changed:
//
//	init     /init, the static krg binary
//	modules  the drivers a node needs to reach its root, with firmware
//	rescue   u-root's commands and shell for the rescue console
//
// Members are deterministic: sorted records, no times, no inode numbers of the
// build machine. Package images calls Init, Modules and Rescue and writes the
// members one after the other.
package initramfs

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

// embedded holds what `make` prepared: krg and rescue.cpio.
//
//go:embed all:embedded
var embedded embed.FS

// ErrNotPrepared says that this krgimage was compiled without its payload.
var ErrNotPrepared = errors.New("this krgimage was built without the node binary and the rescue commands: build it with 'make'")

// Krg returns the embedded static node binary.
func Krg() ([]byte, error) { return payload("krg") }

// RescueCommands returns the embedded, uncompressed u-root archive.
func RescueCommands() ([]byte, error) { return payload("rescue.cpio") }

func payload(name string) ([]byte, error) {
	data, err := embedded.ReadFile("embedded/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", name, ErrNotPrepared)
	}
	return data, err
}

// Init writes the member with /init and the mount points that stage 1 uses.
func Init(w io.Writer, krg []byte) error {
	records := []cpio.Record{
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.CharDev("dev/kmsg", 0o600, 1, 11),
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.StaticFile("init", string(krg), 0o755),
	}
	for _, dir := range []string{"newroot", "proc", "sys", "run", "tmp"} {
		records = append(records, cpio.Directory(dir, 0o755))
	}
	return writeMember(w, records)
}

// Rescue writes the member with the rescue commands.
func Rescue(w io.Writer, archive []byte) error {
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(archive)))
	if err != nil {
		return fmt.Errorf("the rescue commands are not a newc archive: %w", err)
	}
	if len(records) == 0 {
		return errors.New("the rescue commands are not a newc archive: no records in it")
	}
	var keep []cpio.Record
	for _, r := range records {
		if r.Mode&cpioTypeMask != cpioDirectory { // writeMember makes the directories
			keep = append(keep, r)
		}
	}
	return writeMember(w, keep)
}

// File type bits of a cpio mode, as in stat(2).
const (
	cpioTypeMask  = 0o170000
	cpioDirectory = 0o040000
)

// memberAlign is the alignment of a member in the archive: the kernel skips
// zero bytes between members but looks for a header at multiples of four only.
const memberAlign = 4

// writeMember writes the records as one compressed, padded archive member.
func writeMember(w io.Writer, records []cpio.Record) error {
	sortRecords(records)
	cpio.MakeAllReproducible(records)
	counted := &counter{w: w}
	// The kernel's decoder allocates the window, so it stays small.
	zw, err := zstd.NewWriter(counted, zstd.WithEncoderLevel(zstd.SpeedBetterCompression),
		zstd.WithWindowSize(4<<20), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	archive := cpio.Newc.Writer(zw)
	if err := cpio.WriteRecordsAndDirs(archive, records); err != nil {
		return fmt.Errorf("write cpio archive: %w", err)
	}
	if err := cpio.WriteTrailer(archive); err != nil {
		return fmt.Errorf("write cpio archive: %w", err)
	}
	if err := zw.Close(); err != nil {
		return fmt.Errorf("compress archive member: %w", err)
	}
	if rest := counted.n % memberAlign; rest != 0 {
		if _, err := w.Write(make([]byte, memberAlign-rest)); err != nil {
			return err
		}
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
