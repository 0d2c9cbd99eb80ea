package images

import (
	"bytes"
	"debug/buildinfo"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// writeSBOM writes the image's bill of materials as CycloneDX 1.6 JSON: the
// Debian packages of the root, kernel, firmware and loaders, and the Go modules
// that krg was linked from (as the binary itself says).
func writeSBOM(file string, o BuildOptions, info ImageInfo, packages []Package) error {
	bom := cdx.NewBOM()
	bom.SpecVersion = cdx.SpecVersion1_6
	bom.Metadata = &cdx.Metadata{
		Timestamp: o.Epoch.UTC().Format(time.RFC3339),
		Component: &cdx.Component{Type: cdx.ComponentTypeOS, BOMRef: "image", Name: info.Name, Version: info.BuildID},
		Tools: &cdx.ToolsChoice{Components: &[]cdx.Component{
			{Type: cdx.ComponentTypeApplication, Name: "krgimage", Version: o.Version},
		}},
	}
	components := []cdx.Component{{
		Type: cdx.ComponentTypeApplication, BOMRef: "krg", Name: "krg", Version: o.Version,
		Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: info.KrgSHA256}},
	}}
	for _, p := range packages {
		components = append(components, debianComponent(p, o.Cluster.Debian.Suite))
	}
	if build, err := buildinfo.Read(bytes.NewReader(o.Krg)); err == nil {
		for _, dep := range build.Deps {
			purl := fmt.Sprintf("pkg:golang/%s@%s", dep.Path, dep.Version)
			components = append(components, cdx.Component{Type: cdx.ComponentTypeLibrary, BOMRef: purl, Name: dep.Path, Version: dep.Version, PackageURL: purl})
		}
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	components = slices.CompactFunc(components, func(a, b cdx.Component) bool { return a.BOMRef == b.BOMRef })
	bom.Components = &components

	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := cdx.NewBOMEncoder(f, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return fmt.Errorf("write %s: %w", SBOMFile, err)
	}
	return f.Close()
}

// debianComponent names a package by its package URL (purl-spec, type deb). A
// "+" or ":" of a Debian version is percent-encoded there.
func debianComponent(p Package, suite string) cdx.Component {
	version := strings.NewReplacer("+", "%2B", ":", "%3A").Replace(p.Version)
	purl := fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s&distro=%s", p.Name, version, p.Arch, suite)
	c := cdx.Component{Type: cdx.ComponentTypeLibrary, BOMRef: purl, Name: p.Name, Version: p.Version, PackageURL: purl}
	if p.SHA256 != "" {
		c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: p.SHA256}}
	}
	return c
}
