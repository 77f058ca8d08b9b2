import EdgeLlamaCore
import SwiftUI

/// A text, and its label with the probabilities of all labels.
struct ClassifyView: View {
    @State private var screen: ClassifyScreen
    @State private var input: String = ""

    init(screen: ClassifyScreen) {
        _screen = State(initialValue: screen)
    }

    var body: some View {
        VStack(spacing: 0) {
            List {
                if let error: String = screen.error { ErrorText(error) }
                if let answer: Classification = screen.answer {
                    verdict(answer)
                    shares(answer)
                }
            }
            footer
        }
        .navigationTitle("Classify")
        .navigationBarTitleDisplayMode(.inline)
        .onDisappear { screen.stop() }
    }

    private func verdict(_ answer: Classification) -> some View {
        Section {
            Text(answer.label).font(.title2).textSelection(.enabled)
            if let verdict: String = screen.verdict {
                Label(verdict, systemImage: answer.flagged == true ? "flag.fill" : "flag")
                    .foregroundStyle(answer.flagged == true ? Color.red : Color.secondary)
            }
            if let categories: [String] = answer.categories, !categories.isEmpty {
                LabeledContent("Categories", value: categories.joined(separator: ", "))
            }
        }
    }

    private func shares(_ answer: Classification) -> some View {
        Section("Probabilities") {
            ForEach(answer.probabilities.indices, id: \.self) { (index: Int) in bar(answer.probabilities[index]) }
        }
    }

    private func bar(_ share: Classification.Share) -> some View {
        VStack(alignment: .leading) {
            LabeledContent(share.label, value: ClassifyScreen.percent(share.probability))
            ProgressView(value: share.probability, total: 1)
                .accessibilityLabel(share.label)
                .accessibilityValue(ClassifyScreen.percent(share.probability))
        }
    }

    private var footer: some View {
        VStack(alignment: .leading, spacing: 6) {
            if !screen.status.isEmpty {
                Text(screen.status).font(.caption).foregroundStyle(.secondary).textSelection(.enabled)
            }
            HStack {
                TextField("Text to classify", text: $input, axis: .vertical)
                    .textFieldStyle(.roundedBorder)
                    .lineLimit(1...6)
                if screen.isBusy {
                    Button("Stop", systemImage: "stop.circle.fill") { screen.stop() }.labelStyle(.iconOnly)
                } else {
                    Button("Classify", systemImage: "tag.circle.fill") { screen.classify(input) }.labelStyle(.iconOnly)
                }
            }
            .font(.title2)
        }
        .padding()
        .background(.bar)
    }
}
