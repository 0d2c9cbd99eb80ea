package initramfs

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

// DefaultModules are the drivers that every archive carries where the kernel
// has them: wired network cards of ordinary PCs, servers and virtual machines,
// and the file systems of a root. What they depend on follows by itself.
var DefaultModules = []string{
	// virtual machines
	"virtio_net", "virtio_blk", "virtio_scsi", "virtio_rng", "vmxnet3", "hv_netvsc", "xen_netfront", "ena",
	// Intel
	"e100", "e1000", "e1000e", "igb", "igc", "ixgbe", "i40e",
	// Realtek, Broadcom, Marvell, Aquantia, Atheros, Nvidia, VIA and older cards
	"r8169", "8139too", "8139cp", "tg3", "bnx2", "bnx2x", "bnxt_en", "b44", "sky2", "skge", "atlantic",
	"alx", "atl1", "atl1c", "atl1e", "atl2", "forcedeth", "jme", "via_rhine", "via_velocity", "pcnet32",
	"ne2k_pci", "sis900", "sis190", "tulip", "3c59x", "sundance", "starfire", "epic100", "natsemi", "ns83820",
	// 10G and more
	"mlx4_en", "mlx5_core", "be2net", "enic",
	// USB network adapters and the buses they hang on
	"xhci_pci", "ehci_pci", "uhci_hcd", "ohci_pci", "usbnet", "r8152", "asix", "ax88179_178a", "cdc_ether", "cdc_ncm", "smsc75xx", "smsc95xx",
	// keyboard for the rescue console
	"hid_generic", "usbhid", "atkbd", "i8042",
	// roots
	"nfsv3", "overlay", "squashfs", "loop", "isofs", "vfat", "nls_cp437", "nls_ascii", "nls_utf8",
	// media
	"ahci", "sd_mod", "sr_mod", "nvme", "usb_storage", "uas", "ata_piix",
}

// Source is the unpacked kernel package and the firmware beside it.
type Source struct {
	Modules  string // .../lib/modules/RELEASE with modules.dep and its kin (depmod)
	Firmware string // directory that stands for /lib/firmware; empty: none
}

// Selection says what a modules member carries, for the manifest.
type Selection struct {
	Release         string   `json:"release"`
	Modules         []string `json:"modules"`                    // paths below /lib/modules/RELEASE, sorted
	Firmware        []string `json:"firmware,omitempty"`         // paths below /lib/firmware, sorted
	MissingFirmware []string `json:"missing_firmware,omitempty"` // named by a carried driver, not found
	RawBytes        int64    `json:"raw_bytes"`
}

// UnknownModuleError names a wanted module that the kernel doesn't have.
type UnknownModuleError struct {
	Module  string
	Release string
	Near    []string
}

func (e *UnknownModuleError) Error() string {
	msg := fmt.Sprintf("initramfs.modules: kernel %s has no module %q", e.Release, e.Module)
	if len(e.Near) > 0 {
		msg += "; did you mean " + strings.Join(e.Near, ", ") + "?"
	}
	return msg
}

// Modules writes the member with the default and the extra modules, all they
// depend on, the firmware they name, and the index files restricted to them.
// The modules are stored uncompressed: the member is compressed once, as a
// whole, and stage 1 needs no decoder.
//
// A default that this kernel lacks is left out (kernel flavours differ); an
// extra module that it lacks is an *UnknownModuleError.
func Modules(w io.Writer, src Source, extra []string) (Selection, error) {
	index, err := readIndex(src.Modules)
	if err != nil {
		return Selection{}, err
	}
	release := filepath.Base(src.Modules)
	for _, name := range extra {
		if !index.has(name) {
			return Selection{}, &UnknownModuleError{name, release, index.near(name)}
		}
	}
	paths := index.closure(append(slices.Clone(DefaultModules), extra...))
	sel := Selection{Release: release}
	base := path.Join("lib/modules", release)
	var records []cpio.Record
	firmware := map[string]bool{}
	for _, p := range paths {
		ko, err := readModule(filepath.Join(src.Modules, p))
		if err != nil {
			return Selection{}, err
		}
		names, err := firmwareOf(ko)
		if err != nil {
			return Selection{}, fmt.Errorf("module %s: %w", p, err)
		}
		for _, n := range names {
			firmware[n] = true
		}
		plain := plainPath(p)
		sel.Modules = append(sel.Modules, plain)
		sel.RawBytes += int64(len(ko))
		records = append(records, cpio.StaticFile(path.Join(base, plain), string(ko), 0o644))
	}
	files, err := index.restricted(paths)
	if err != nil {
		return Selection{}, err
	}
	for _, file := range files {
		records = append(records, cpio.StaticFile(path.Join(base, file.name), string(file.data), 0o644))
	}
	blobs, missing, err := findFirmware(src.Firmware, firmware)
	if err != nil {
		return Selection{}, err
	}
	for _, b := range blobs {
		sel.Firmware = append(sel.Firmware, b.name)
		sel.RawBytes += int64(len(b.data))
		records = append(records, cpio.StaticFile(path.Join("lib/firmware", b.name), string(b.data), 0o644))
	}
	sel.MissingFirmware = missing
	sort.Strings(sel.Modules)
	return sel, writeMember(w, records)
}

// index is what depmod wrote about a kernel's modules.
type index struct {
	paths   map[string]string   // module name → path as in modules.dep
	deps    map[string][]string // path → paths it needs
	soft    map[string][]string // module name → names it wants before or after
	builtin map[string]bool
	dir     string
}

func readIndex(dir string) (*index, error) {
	ix := &index{map[string]string{}, map[string][]string{}, map[string][]string{}, map[string]bool{}, dir}
	err := eachLine(filepath.Join(dir, "modules.dep"), func(line string) {
		p, deps, ok := strings.Cut(line, ":")
		if !ok {
			return
		}
		ix.paths[moduleName(p)] = p
		ix.deps[p] = strings.Fields(deps)
	})
	if err != nil {
		return nil, fmt.Errorf("kernel modules without an index (run depmod): %w", err)
	}
	err = eachLine(filepath.Join(dir, "modules.softdep"), func(line string) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "softdep" {
			return
		}
		for _, dep := range f[2:] {
			if dep != "pre:" && dep != "post:" {
				ix.soft[normal(f[1])] = append(ix.soft[normal(f[1])], normal(dep))
			}
		}
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	err = eachLine(filepath.Join(dir, "modules.builtin"), func(line string) { ix.builtin[moduleName(line)] = true })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return ix, nil
}

func (ix *index) has(name string) bool {
	return ix.paths[normal(name)] != "" || ix.builtin[normal(name)]
}

// closure returns the paths of the named modules and of all they depend on,
// sorted. Names without a file (built in, or not in this kernel) add nothing.
func (ix *index) closure(names []string) []string {
	seen := map[string]bool{}
	var add func(p string)
	add = func(p string) {
		if p == "" || seen[p] {
			return
		}
		seen[p] = true
		for _, d := range ix.deps[p] {
			add(d)
		}
		for _, s := range ix.soft[moduleName(p)] {
			add(ix.paths[s])
		}
	}
	for _, n := range names {
		add(ix.paths[normal(n)])
	}
	out := make([]string, 0, len(seen))
	for p := range seen {
		out = append(out, p)
	}
	sort.Strings(out)
	return out
}

// near lists modules whose name contains the wanted one or starts like it.
func (ix *index) near(name string) []string {
	var out []string
	for n := range ix.paths {
		if strings.Contains(n, normal(name)) || (len(name) > 3 && strings.HasPrefix(n, normal(name)[:3])) {
			out = append(out, n)
		}
	}
	sort.Strings(out)
	return out[:min(len(out), 5)]
}

type namedFile struct {
	name string
	data []byte
}

// restricted returns the index files with only the carried modules in them.
func (ix *index) restricted(paths []string) ([]namedFile, error) {
	carried := map[string]bool{}
	var dep bytes.Buffer
	for _, p := range paths {
		carried[moduleName(p)] = true
		dep.WriteString(plainPath(p) + ":")
		for _, d := range ix.deps[p] {
			dep.WriteString(" " + plainPath(d))
		}
		dep.WriteByte('\n')
	}
	files := []namedFile{{"modules.dep", dep.Bytes()}}
	filter := func(name string, keep func(fields []string) bool) error {
		var buf bytes.Buffer
		err := eachLine(filepath.Join(ix.dir, name), func(line string) {
			if f := strings.Fields(line); len(f) > 0 && keep(f) {
				buf.WriteString(line + "\n")
			}
		})
		files = append(files, namedFile{name, buf.Bytes()})
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a kernel without the file has nothing to restrict
		}
		return err
	}
	err := errors.Join(
		filter("modules.alias", func(f []string) bool { return len(f) > 1 && carried[normal(f[len(f)-1])] }),
		filter("modules.softdep", func(f []string) bool { return len(f) > 1 && carried[normal(f[1])] }),
		filter("modules.builtin", func([]string) bool { return true }),
	)
	return files, err
}

func eachLine(file string, f func(line string)) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		f(sc.Text())
	}
	return sc.Err()
}

// normal writes a module name the kernel's way: with underscores.
func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

// plainPath is a module's path without the compression suffix.
func plainPath(p string) string {
	for _, suffix := range []string{".xz", ".zst", ".gz"} {
		p = strings.TrimSuffix(p, suffix)
	}
	return p
}

func moduleName(p string) string {
	return normal(strings.TrimSuffix(path.Base(plainPath(p)), ".ko"))
}

// maxModule bounds one decompressed module: the largest of Debian's are 20 MB.
const maxModule = 256 << 20

func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("kernel module: %w", err)
	}
	defer f.Close()
	var r io.Reader = bufio.NewReaderSize(f, 1<<20)
	switch filepath.Ext(file) {
	case ".xz":
		r, err = xz.NewReader(r)
	case ".zst":
		var zr *zstd.Decoder
		zr, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err == nil {
			defer zr.Close()
			r = zr
		}
	}
	if err != nil {
		return nil, fmt.Errorf("kernel module %s: %w", file, err)
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule))
	if err != nil {
		return nil, fmt.Errorf("kernel module %s is damaged: %w", file, err)
	}
	return data, nil
}

// firmwareOf returns the firmware files a module names in its .modinfo section:
// NUL-separated key=value strings (include/linux/module.h, MODULE_FIRMWARE).
func firmwareOf(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, fmt.Errorf("not an ELF object: %w", err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil
	}
	data, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("section .modinfo: %w", err)
	}
	var names []string
	for _, entry := range strings.Split(string(data), "\x00") {
		if name, ok := strings.CutPrefix(entry, "firmware="); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// findFirmware reads the wanted files (names may hold shell patterns) below
// dir. Files may be stored compressed: the kernel unpacks .xz and .zst itself.
func findFirmware(dir string, wanted map[string]bool) (found []namedFile, missing []string, err error) {
	have := map[string]bool{}
	names := make([]string, 0, len(wanted))
	for n := range wanted {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, name := range names {
		if dir == "" || !filepath.IsLocal(name) {
			missing = append(missing, name)
			continue
		}
		var hits []string
		for _, suffix := range []string{"", ".xz", ".zst"} {
			m, err := filepath.Glob(filepath.Join(dir, name) + suffix)
			if err != nil {
				return nil, nil, fmt.Errorf("firmware name %q: %w", name, err)
			}
			hits = append(hits, m...)
		}
		if len(hits) == 0 {
			missing = append(missing, name)
		}
		for _, hit := range hits {
			rel, err := filepath.Rel(dir, hit)
			if err != nil || have[rel] {
				continue
			}
			data, err := readInside(dir, rel)
			if err != nil {
				return nil, nil, fmt.Errorf("firmware %s: %w", rel, err)
			}
			have[rel] = true
			found = append(found, namedFile{rel, data})
		}
	}
	return found, missing, nil
}

// readInside follows links, but only such as stay in dir.
func readInside(dir, rel string) ([]byte, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.ReadFile(rel)
}

// sortRecords orders an archive by path: the same files, the same bytes.
func sortRecords(records []cpio.Record) {
	sort.SliceStable(records, func(i, j int) bool { return records[i].Name < records[j].Name })
}
